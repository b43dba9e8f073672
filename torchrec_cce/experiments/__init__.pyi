from .bench import (
    bench as bench,
    chosen_outcomes as chosen_outcomes,
)
from .dense_ids import write_dense as write_dense
from .experiment_report import (
    ExperimentReport as ExperimentReport,
    write_experiment_report as write_experiment_report,
)
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
from .results import (
    Results as Results,
    read_results as read_results,
)
