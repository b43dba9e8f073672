"""What a run reads: its files, which of their rows, and what their fields are."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid")


def _paths(value: Any) -> Any:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list | tuple) or not paths or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{value!r} is neither a file, folder or pattern nor a list of them")
    return value if isinstance(value, str) else tuple(paths)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SplitConfig:
    """Rows of a file, or of several files one after the other.

    The numbers of the rows alone decide which rows these are: a resumed run, any number of ranks, another batch size
    and another chunk size of the reader find the same rows.
    """

    path: Annotated[str | tuple[str, ...], BeforeValidator(_paths)]
    """A file, or for Parquet also a folder of `*.parquet`, for remapped data a tree of `*.parquet` and `*.arrow`;
    relative to the working directory. Or a pattern, `day_*.gz`: all that match, `day_2` before `day_10`, whenever the
    split is read. Or a list of these, in this order."""
    skip_rows: NonNegativeInt = 0
    """Rows to pass over, counted over all files together."""
    max_rows: PositiveInt | None = None
    """Rows to read after those; all if not given."""
    sample_every: PositiveInt = 1
    """Of every so many of these rows the first one is read. The paper trains and evaluates on an eighth of the Terabyte
    log and does not say how it was drawn. We take every eighth row (8), whatever its label, which leaves days and their
    hours as they are. (DLRM's `--data-sub-sample-rate=0.875` only drops rows without a click, which changes click rate
    and BCE.)"""
    part: tuple[NonNegativeInt, PositiveInt] | None = None
    """`[i, n]`: of the rows that are left, numbered from 0, those whose number is i modulo n; all if not given.
    `[0, 2]` and `[1, 2]` halve a day whose number of rows is unknown, and both halves cover the same hours. (DLRM takes
    the first half as test and the second as validation split: use `max_rows` and `skip_rows` if you know the number of
    rows.)"""

    def __post_init__(self) -> None:
        if self.part is not None and self.part[0] >= self.part[1]:
            i, n = self.part
            raise ValueError(f"part=[{i}, {n}] must be [i, n] with i in 0..{n - 1}; the first of two halves is [0, 2]")

    def __str__(self) -> str:
        return self.path if isinstance(self.path, str) else ", ".join(self.path)

    @property
    def every(self) -> int:
        """Of every so many rows between `skip_rows` and `max_rows` one is read."""
        return self.sample_every * (1 if self.part is None else self.part[1])

    @property
    def first(self) -> int:
        """The number of that row, from 0 on."""
        return self.sample_every * (0 if self.part is None else self.part[0])


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """What to read, and how the fields of its files become label, dense features and raw IDs."""

    format: Literal["criteo", "parquet", "remapped"]
    """`criteo` is the TSV of the Kaggle and Terabyte logs, plain or .gz, with features `C1 … C26`. `remapped` is what
    `torchrec-cce remap` wrote, Parquet or Arrow, with the pointers of one version of the maps; what is said of Parquet
    below holds for it too."""
    train: SplitConfig
    validation: SplitConfig | None = None
    test: SplitConfig | None = None
    label: str = "label"
    """Parquet: the field of clicks, 0 or 1."""
    dense: tuple[str, ...] = ()
    """Parquet: fields of numbers."""
    dense_transform: Literal["log1p", "none"] = "none"
    """Parquet: `log1p` is DLRM's log(1 + x), negative values as 0."""
    columns: dict[str, str] = field(default_factory=dict)
    """Parquet: feature → field of its raw IDs; the raw IDs of any other feature are in a field of its own name."""
