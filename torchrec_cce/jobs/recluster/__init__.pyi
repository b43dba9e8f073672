from .job import (
    ReclusterResult as ReclusterResult,
    recluster as recluster,
)
from .request import (
    Forecast as Forecast,
    ReclusterJob as ReclusterJob,
    foresee as foresee,
)
from .summary import ReclusterSummary as ReclusterSummary
from .thresholds import Thresholds as Thresholds
