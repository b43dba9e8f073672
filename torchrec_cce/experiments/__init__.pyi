from .dense_ids import write_dense as write_dense
from .experiment_report import experiment_report as experiment_report
from .pareto import (
    Candidate as Candidate,
    advise as advise,
)
from .plan import (
    DeriveFrom as DeriveFrom,
    MethodEntry as MethodEntry,
    Plan as Plan,
    read_plan as read_plan,
)
from .planted_log import write_click_log as write_click_log
from .report import (
    Report as Report,
    write_report as write_report,
)
from .results import (
    Results as Results,
    TrialResult as TrialResult,
    chosen_results as chosen_results,
    read_results as read_results,
)
from .runner import bench as bench
