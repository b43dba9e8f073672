from .forecast import (
    Forecast as Forecast,
    foresee as foresee,
)
from .job import (
    Reclustered as Reclustered,
    recluster as recluster,
)
from .outcome import Outcome as Outcome
from .request import ReclusterJob as ReclusterJob
from .thresholds import Thresholds as Thresholds
