"""AUC against bytes over all that was run, and the front of what no other beats."""

from collections.abc import Sequence

from torchrec_cce.experiments.chart import Chart, Series, Style, visible_range
from torchrec_cce.experiments.family import family_of
from torchrec_cce.experiments.pareto import Candidate


def pareto_chart(candidates: Sequence[Candidate], front: Sequence[Candidate]) -> Chart:
    """Test AUC of everything by family, and the entries that validation AUC puts on the front, joined."""
    families: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        families.setdefault(family_of(candidate.method), []).append(candidate)
    series = [_series(family, members) for family, members in families.items()]
    return Chart(
        name="pareto",
        caption="Test AUC against the bytes of tables and pointers, host and accelerator together. The line joins what "
        "no other entry beats in both size and validation AUC; as it is drawn in test AUC it may fall",
        x_label="bytes of tables and pointers",
        y_label="test AUC",
        series=(*series, _series("front", front, style="reference")),
        log_x=True,
        y_range=visible_range(series, lower_is_better=False),
    )


def _series(label: str, members: Sequence[Candidate], *, style: Style = "points") -> Series:
    return Series(
        label=label,
        x=tuple(float(one.total_bytes) for one in members),
        y=tuple(one.auc.mean for one in members),
        style=style,
        runs=tuple(one.runs for one in members),
    )
