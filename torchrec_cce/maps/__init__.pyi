from .journal import (
    PublishedVersion as PublishedVersion,
    RegistryState as RegistryState,
)
from .pointer_map import PointerMap as PointerMap
from .registry import (
    Collected as Collected,
    MapVersion as MapVersion,
    Registry as Registry,
)
from .residency import Residency as Residency
from .snapshot import (
    Churn as Churn,
    MapHolder as MapHolder,
    TableSnapshot as TableSnapshot,
    churn as churn,
)
from .vocabulary import Vocabulary as Vocabulary
