"""The sections of a run's configuration that say how pointers are found: by clusterings, and by residents."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from torchrec_cce.clustering.settings import Backend, ReclusterConfig
from torchrec_cce.methods.residents import ResidentConfig, RowType

LearningRate = Annotated[FiniteFloat, Field(gt=0)]
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ReclusterSection:
    """When and how CCE tables are clustered: after batches `cf`, `2·cf`, …, `ct·cf`."""

    ct: NonNegativeInt = 0
    """Clusterings in the run."""
    cf: NonNegativeInt = 0
    """Batches between two clusterings."""
    rest: NonNegativeInt | None = None
    """Batches trained after the last clustering, where the run then ends; to the end of the data if not given."""
    weigh_by_frequency: bool = False
    """Weigh IDs by how often they were trained on. This costs 8 bytes an ID."""
    points_per_centroid: int = 256
    num_iterations: int = 50
    backend: Backend = "numba"
    """The implementation of k-means: our own, or another one that has to be installed."""
    helper_init: Literal["zero", "residual"] = "zero"

    def __post_init__(self) -> None:
        if self.ct > 0 and self.cf < 1:
            raise ValueError(f"cf={self.cf} must be at least 1 where ct is {self.ct}: the batches between clusterings")
        self.settings()

    def settings(self) -> ReclusterConfig:
        return ReclusterConfig(
            points_per_centroid=self.points_per_centroid,
            num_iterations=self.num_iterations,
            backend=self.backend,
            helper_init=self.helper_init,
        )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ResidentsSection:
    """`cce_residents`: the private rows. The first phase begins with the run, and another after every clustering of
    `recluster` but the last; after that the codewords are trained."""

    fraction: Annotated[FiniteFloat, Field(gt=0, le=1)] = 0.25
    """Of the IDs of a table that have a row at a time."""
    max_bytes: PositiveInt | None = None
    """In place of `fraction`: what residents may take while training, over all tables: rows, their optimizer's state
    of row-wise Adagrad, ages and slots."""
    shrinkage: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.5
    """What an ID that gets a row again loses of the embedding it has, as a share."""
    dtype: RowType = "float32"
    """Of the rows; see `ResidentConfig`."""
    learning_rate: LearningRate | None = None
    """Of the rows; `optimizer.embedding_learning_rate` if not given."""
    codeword_learning_rate: LearningRate | None = None
    """Of the codewords after the last clustering; a tenth of `optimizer.embedding_learning_rate` if not given."""
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    """Of rows that are float16 or int8."""
    count_first: bool = True
    """Whether to read the training split once before the first batch, to count how often each ID occurs: the first rows
    go to the most frequent ones. If not, they are counted on the way, and the first rows go to IDs as they arrive."""
    newcomers: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.0
    """With `count_first = false`: the share of rows that are kept in every phase for IDs that come in it."""

    def __post_init__(self) -> None:
        if self.newcomers > 0 and self.count_first:
            raise ValueError(f"newcomers={self.newcomers} needs count_first=false, which counts IDs as they come")
        self.config(learning_rate=1.0)

    def config(self, learning_rate: float, fraction: float | None = None) -> ResidentConfig:
        """Of a table, with the learning rate of its rows, and another `fraction` if it is given."""
        return ResidentConfig(
            fraction=fraction or self.fraction,
            shrinkage=self.shrinkage,
            dtype=self.dtype,
            learning_rate=learning_rate,
            weight_decay=self.weight_decay,
            first_come=not self.count_first,
            newcomers=self.newcomers,
        )
