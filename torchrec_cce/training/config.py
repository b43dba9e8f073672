"""The configuration of a training run: one TOML file, checked before anything is read or built."""

import re
import sys
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torchrec import EmbeddingBagConfig, PoolingType

from torchrec_cce.budget import Method, tables_under_cap
from torchrec_cce.clustering.recluster import ReclusterConfig
from torchrec_cce.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SplitConfig:
    """A stretch of a file."""

    path: str
    """A file, or for Parquet also a folder of `*.parquet`; relative to the working directory."""
    skip_rows: int = 0
    max_rows: int | None = None
    """Rows read after the skipped ones; all if not given."""

    def __post_init__(self) -> None:
        if self.skip_rows < 0 or (self.max_rows is not None and self.max_rows < 1):
            raise ValueError(f"skip_rows={self.skip_rows}, max_rows={self.max_rows}: not a stretch of rows")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """What to read, and how columns become label, dense features and raw IDs."""

    format: Literal["criteo", "parquet"]
    """`criteo` is the TSV of the Kaggle and Terabyte logs, plain or .gz, with features `C1 … C26`."""
    train: SplitConfig
    validation: SplitConfig | None = None
    test: SplitConfig | None = None
    label: str = "label"
    """Parquet: the column of clicks, 0 or 1."""
    dense: tuple[str, ...] = ()
    """Parquet: columns of numbers."""
    dense_transform: Literal["log1p", "none"] = "none"
    """Parquet: `log1p` is DLRM's log(1 + x), negative values as 0."""
    columns: dict[str, str] = field(default_factory=dict)
    """Parquet: feature → column of its raw IDs; a feature that is not named here has a column of its own name."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TableConfig:
    """One embedding table."""

    num_embeddings: int
    """Size of the universe; raw IDs are brought into it by the paper's modulus pre-hash."""
    features: tuple[str, ...] = ()
    """The features that share the table; by default the one that it is named after."""
    pooling: Literal["sum", "mean"] = "sum"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EmbeddingConfig:
    """How tables are compressed."""

    dim: int = 16
    method: Method = "cce"
    max_parameters: int | None = None
    """The cap for each table; tables below it stay full. Needed by every method but `full`."""
    num_columns: int = 4

    def __post_init__(self) -> None:
        if self.max_parameters is None and self.method != "full":
            raise ValueError(f"method {self.method!r} needs max_parameters, the cap for each table")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    """What the embeddings feed."""

    name: Literal["dlrm", "gmf"] = "dlrm"
    bottom: tuple[int, ...] = (64,)
    """DLRM: hidden sizes of the dense arch, which ends in `embedding.dim`."""
    top: tuple[int, ...] = (64,)
    """DLRM: hidden sizes of the over arch, which ends in 1."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimizerConfig:
    """One optimizer for the embedding tables and one for the rest."""

    embedding: Literal["sgd", "rowwise_adagrad", "adagrad", "adam", "adamw"] = "rowwise_adagrad"
    """The first three are fused into the backward pass by FBGEMM; with the others tables are replicated."""
    embedding_learning_rate: float = 0.05
    dense: Literal["sgd", "adam", "adamw"] = "adam"
    dense_learning_rate: float = 1e-3


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ReclusterSection:
    """When and how CCE tables are clustered: after batches `cf`, `2·cf`, …, `ct·cf`."""

    ct: int = 0
    """Clusterings in the run."""
    cf: int = 0
    """Batches between two clusterings."""
    rest: int | None = None
    """Batches trained after the last clustering, where the run then ends; to the end of the data if not given."""
    weigh_by_frequency: bool = False
    """Weigh IDs by how often they were trained on; costs 8 bytes an ID."""
    points_per_centroid: int = 256
    num_iterations: int = 50
    helper_init: Literal["zero", "residual"] = "zero"

    def __post_init__(self) -> None:
        if self.ct < 0 or (self.ct > 0 and self.cf < 1) or (self.rest is not None and self.rest < 0):
            raise ValueError(f"ct={self.ct}, cf={self.cf}, rest={self.rest}: not a schedule of clusterings")
        self.settings()

    def settings(self) -> ReclusterConfig:
        return ReclusterConfig(
            points_per_centroid=self.points_per_centroid,
            num_iterations=self.num_iterations,
            helper_init=self.helper_init,
        )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainingConfig:
    batch_size: int = 2048
    """Rows of a global batch, shared by the ranks."""
    epochs: int = 1
    evaluate_every: int | None = None
    """Batches between two evaluations on the validation split; once an epoch if not given."""
    early_stopping: bool = False
    """Stop after an epoch whose best validation BCE is not below that of the epoch before, once clustering is over."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.epochs < 1 or (self.evaluate_every is not None and self.evaluate_every < 1):
            raise ValueError("batch_size, epochs and evaluate_every must be at least 1")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunConfig:
    """A whole run."""

    data: DataConfig
    tables: dict[str, int | TableConfig]
    """Table → its `num_embeddings`, or a `TableConfig`."""
    embedding: EmbeddingConfig = EmbeddingConfig(method="full")
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    recluster: ReclusterSection = ReclusterSection()
    training: TrainingConfig = TrainingConfig()
    seed: int = 0
    """Of weights, hash functions and clusterings."""

    def __post_init__(self) -> None:
        if self.training.early_stopping and self.data.validation is None:
            raise ValueError("early_stopping needs data.validation")
        if not self.tables:
            raise ValueError("tables is empty; name at least one")
        self.table_configs()

    def full_tables(self) -> list[EmbeddingBagConfig]:
        """The tables before compression."""
        pooling = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}
        specs = {
            name: TableConfig(num_embeddings=table) if isinstance(table, int) else table
            for name, table in self.tables.items()
        }
        return [
            EmbeddingBagConfig(
                name=name,
                num_embeddings=spec.num_embeddings,
                embedding_dim=self.embedding.dim,
                feature_names=list(spec.features or (name,)),
                pooling=pooling[spec.pooling],
            )
            for name, spec in specs.items()
        ]

    def table_configs(self) -> list[EmbeddingBagConfig]:
        """The tables as they are trained."""
        return tables_under_cap(
            self.full_tables(),
            method=self.embedding.method,
            max_parameters=self.embedding.max_parameters or 0,
            num_columns=self.embedding.num_columns,
            seed=self.seed,
        )

    def universes(self) -> dict[str, int]:
        """Feature → size of the universe of its table."""
        return {feature: table.num_embeddings for table in self.full_tables() for feature in table.feature_names}

    def as_dict(self) -> dict[str, Any]:
        """JSON values that `RunConfig` can be made of again."""
        values: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return values


_ADAPTER = TypeAdapter(RunConfig)


def parse_config(values: dict[str, Any]) -> RunConfig:
    """A RunConfig from plain values, e.g. parsed TOML or JSON. Raises pydantic's ValidationError."""
    return _ADAPTER.validate_python(values)


def read_config(path: str | Path) -> RunConfig:
    """Read and check a TOML file.

    Raises:
        ConfigError: one line, `path:line: what is wrong`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        return parse_config(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        at = line.group(1) if line else len(text.splitlines())
        raise ConfigError(f"{path}:{at}: not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        keys = [str(part) for part in first["loc"] if str(part) in text]
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}:{_line_of(text, keys)}: {'.'.join(keys) or 'config'}: {message}") from error


def _line_of(text: str, keys: list[str]) -> int:
    """The line of the TOML `text` that sets `keys`, or else of the innermost table that should have."""
    best_line, best_depth = 1, 0
    table: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[+([^\]]+)\]", line)
        assignment = re.match(r"""\s*["']?([\w.-]+?)["']?\s*=""", line)
        if header:
            table = [part.strip(" \"'") for part in header.group(1).split(".")]
        if header or assignment:
            path = table if header else [*table, *(assignment.group(1).split(".") if assignment else [])]
            if len(path) > best_depth and path == keys[: len(path)]:
                best_line, best_depth = number, len(path)
    return best_line
