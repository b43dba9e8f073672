"""The configuration of a training run, checked before anything is read or built."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass
from pydantic_core import InitErrorDetails, PydanticCustomError
from torch import nn
from torchrec import EmbeddingBagConfig, PoolingType

from torchrec_cce.data.criteo import KAGGLE_UNIVERSES
from torchrec_cce.maps.pointer_format import MinPointerBits
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.methods.registry import Method, tables_under_cap
from torchrec_cce.methods.residents import ResidentConfig
from torchrec_cce.modules.state_names import CODEWORDS, RESIDENTS
from torchrec_cce.training.data_config import DataConfig
from torchrec_cce.training.recluster_config import LearningRate, ReclusterSection, ResidentsSection
from torchrec_cce.training.rowwise import Bits, row_bytes

_STRICT = ConfigDict(extra="forbid")


def can_name_a_table(name: str) -> bool:
    """PyTorch keeps tables as the modules of a `ModuleDict`, where `type` or `a.b` cannot be a name."""
    return bool(name) and not set(name) & {".", "@"} and not hasattr(nn.ModuleDict(), name)


def _table_name(name: str) -> str:
    if not can_name_a_table(name):
        raise ValueError(
            f"{name!r} cannot name a table: PyTorch has another use for it; choose another name and give the table "
            f"features = [{name!r}]"
        )
    return name


TableName = Annotated[str, AfterValidator(_table_name)]

TABLE_PRESETS: Mapping[str, Mapping[str, int]] = {"criteo_kaggle": KAGGLE_UNIVERSES}
"""Name → table → `num_embeddings`, for what a file may say in one line: `tables = "criteo_kaggle"`."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TableConfig:
    """One embedding table."""

    num_embeddings: PositiveInt
    """Size of the universe. The paper's modulus pre-hash brings raw IDs into it, unless the table's map has a
    vocabulary or a policy for unknown IDs."""
    features: tuple[str, ...] = ()
    """The features that share the table; by default the feature that it is named after."""
    pooling: Literal["sum", "mean"] = "sum"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EmbeddingConfig:
    """How tables are compressed."""

    dim: PositiveInt = 16
    method: Method = "cce"
    max_parameters: PositiveInt | None = None
    """The most parameters of each table; smaller tables stay full. Needed by every method but `full`."""
    full_up_to: NonNegativeInt = 0
    """Tables of at most so many IDs stay full, whatever `max_parameters` is."""
    num_columns: PositiveInt = 4
    min_pointer_bits: MinPointerBits = 8
    """`cce`, `cce_residents`, `pq`: 4 to store two learned pointers in a byte where tables have at most 16 rows."""
    num_terms: PositiveInt | None = None
    """Number of codewords that are summed, for the methods that leave it open, see `tables_under_cap`; if not given,
    the usual number of the method."""
    use_helper: bool = True
    """`cce`: False trains the codebook alone, as data needs that was remapped without helper. The pointers then learn
    nothing: a column has `k` different embeddings, which every clustering finds again. For CCE whose last phase is
    without helper, derive `pq` from a run of `cce` or `ce_hybrid`."""

    def __post_init__(self) -> None:
        if not self.use_helper and self.method != "cce":
            raise ValueError(f"use_helper=false is for method='cce'; it is {self.method!r}")
        if self.max_parameters is None and self.method != "full":
            raise ValueError(f"method={self.method!r} needs max_parameters, the cap for each table")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    """What the embeddings feed."""

    name: Literal["dlrm", "gmf"] = "dlrm"
    bottom: tuple[PositiveInt, ...] = (64,)
    """DLRM: hidden sizes of the dense arch, which ends in `embedding.dim`."""
    top: tuple[PositiveInt, ...] = (64,)
    """DLRM: hidden sizes of the over arch, which ends in 1."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimizerConfig:
    """One optimizer for the embedding tables and one for the rest."""

    embedding: Literal["sgd", "rowwise_adagrad", "adagrad", "adam", "adamw"] = "rowwise_adagrad"
    """FBGEMM can fuse the first three into the backward pass, if there is no weight decay. Otherwise tables are
    replicated."""
    embedding_learning_rate: LearningRate = 0.05
    embedding_weight_decay: Annotated[FiniteFloat, Field(ge=0)] | None = None
    """Weight decay of the embedding tables; if not given, the optimizer's own default: 0.01 for adamw, 0 for the
    others. Tables that overfit need it, CCE's most of all: a clustering writes what was memorised into the pointers."""
    dense: Literal["sgd", "adam", "adamw"] = "adam"
    dense_learning_rate: LearningRate = 1e-3


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RegistrySection:
    """Where maps and codebooks come from and are published."""

    url: str | None = None
    """A folder, `s3://bucket/prefix` or the like: a version after every clustering. None: nothing is published."""
    start: int | str | None = None
    """The version whose tables a new run starts from: its maps, with their vocabularies, and its codewords. `"current"`
    is the version that is current when the run starts. None: a run starts from hashes and random codewords."""
    watch_every: PositiveInt | None = None
    """Batches between two looks at which version is current. The run adopts a new one. None: it keeps its own maps."""

    def __post_init__(self) -> None:
        if isinstance(self.start, str) and self.start != "current":
            raise ValueError(f"start={self.start!r} is neither 'current' nor the number of a version")
        if self.start is not None and self.url is None:
            raise ValueError(f"start={self.start!r} needs url, the registry that has the version")
        if self.watch_every is not None and self.url is None:
            raise ValueError(f"watch_every={self.watch_every} needs url, the registry to watch")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DeriveSection:
    """Another run, whose newest checkpoint a new run starts from: large tables get pointers and codewords by
    quantization of its embeddings."""

    run: str
    """Its folder. It must have the same tables and dimension, but may have any method and any number of parameters."""
    dense: bool = True
    """Whether to take over all its other weights, too."""
    circular: bool = False
    """Whether to cluster each column by the other columns, which collapses, see `quantize`."""
    bits: Bits | None = None
    """`full`: quantize each row of the trained tables to so many bits a number, as TorchRec serves them. None: not."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainingConfig:
    """How long to train, and what is done in between."""

    batch_size: PositiveInt = 2048
    """Rows of a global batch, shared by the ranks."""
    epochs: NonNegativeInt = 1
    """0: the model that the run starts from is only evaluated."""
    evaluate_every: PositiveInt | None = None
    """Batches between two evaluations on the validation split; once an epoch if not given."""
    checkpoint_every: PositiveInt | None = None
    """Batches between two checkpoints; if not given, there is one at the end and one when a run is interrupted."""
    checkpoint_in_background: bool = False
    """Whether to train on while a checkpoint is written from a copy of weights and optimizer state. It counts once it
    is whole, which is checked when the next one is due."""
    early_stopping: bool = False
    """Whether to stop after an epoch whose best validation BCE is not below that of the epoch before, once all
    clusterings are done."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunConfig:
    """A whole run."""

    data: DataConfig
    tables: Annotated[dict[TableName, TableConfig], Field(min_length=1)]
    """In a file also table → its `num_embeddings` alone, or the name of one of `TABLE_PRESETS` in place of all."""
    embedding: EmbeddingConfig = EmbeddingConfig(method="full")
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    recluster: ReclusterSection = ReclusterSection()
    residents: ResidentsSection | None = None
    registry: RegistrySection = RegistrySection()
    derive: DeriveSection | None = None
    training: TrainingConfig = TrainingConfig()
    seed: int = 0
    """The seed of weights, hash functions and clusterings."""

    def __post_init__(self) -> None:
        if self.training.early_stopping and self.data.validation is None:
            raise ValueError("early_stopping=true needs data.validation")
        if self.training.epochs == 0 and self.derive is None and self.registry.start is None:
            raise ValueError("epochs=0 is for a run that starts from another one, by derive or by registry.start")
        if self.derive is not None and self.registry.start is not None:
            raise ValueError("derive and registry.start are two models to start from; give one of them")
        if self.registry.start is not None and self.embedding.method not in ("cce", "cce_residents"):
            start, method = self.registry.start, self.embedding.method
            raise ValueError(f"start={start!r} is for method='cce' or 'cce_residents'; it is {method!r}")
        if self.recluster.helper_init == "residual" and not self.embedding.use_helper:
            raise ValueError("helper_init='residual' needs embedding.use_helper=true")
        if self.data.format == "remapped":
            self._check_maps_stay()
        self._check_residents()
        self._check_bits()
        features: dict[str, str] = {}
        for table in self.full_tables():
            for feature in table.feature_names:
                if feature in features:
                    raise ValueError(f"tables={[features[feature], table.name]} both read {feature!r}; one table must")
                features[feature] = table.name
        if self.model.name == "gmf" and len(features) != 2:
            raise ValueError(f"name='gmf' needs two features, a user and an item; there are {list(features)}")
        self.table_configs()

    def _check_maps_stay(self) -> None:
        """Remapped data has the pointers of one version, and lacks the raw IDs that another version would need."""
        if self.recluster.ct > 0:
            raise ValueError(
                f"ct={self.recluster.ct}: remapped data has the pointers of one version of the maps, and a clustering "
                "makes another; set ct = 0, cluster a checkpoint with torchrec-cce recluster, and remap the raw data "
                "again"
            )
        if self.recluster.weigh_by_frequency:
            raise ValueError("weigh_by_frequency=true counts raw IDs, which remapped data does not have")
        if self.registry.watch_every is not None:
            raise ValueError(
                f"watch_every={self.registry.watch_every}: remapped data has the pointers of one version of the maps, "
                "the run cannot move to another"
            )

    def _check_residents(self) -> None:
        """Residents need clusterings of their own, which fold their rows."""
        if self.embedding.method != "cce_residents":
            if self.residents is not None:
                raise ValueError(f"residents are for embedding.method='cce_residents'; it is {self.embedding.method!r}")
            return
        named = "embedding.method='cce_residents'"
        if self.recluster.ct < 1:
            raise ValueError(f"ct={self.recluster.ct} must be at least 1 for {named}: a clustering folds the rows")
        if self.recluster.helper_init == "residual":
            raise ValueError(f"helper_init='residual' is not for {named}, which has no helper")
        if self.resident_settings.max_bytes is not None:
            self.table_configs()

    def _check_bits(self) -> None:
        """Rows of few bits are read, and not trained."""
        if self.derive is None or self.derive.bits is None:
            return
        if self.embedding.method != "full" or self.training.epochs > 0:
            raise ValueError(
                f"bits={self.derive.bits} is for embedding.method='full' with training.epochs=0; they are "
                f"{self.embedding.method!r} and {self.training.epochs}"
            )
        row_bytes(self.embedding.dim, self.derive.bits)

    def full_tables(self) -> list[EmbeddingBagConfig]:
        """The tables before compression."""
        pooling = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}
        return [
            EmbeddingBagConfig(
                name=name,
                num_embeddings=table.num_embeddings,
                embedding_dim=self.embedding.dim,
                feature_names=list(table.features or (name,)),
                pooling=pooling[table.pooling],
            )
            for name, table in self.tables.items()
        ]

    def table_configs(self, method: Method | None = None) -> list[EmbeddingBagConfig]:
        """The tables as they are trained, or as they would be with another `method`."""
        section, rate = self.resident_settings, self.resident_rates[RESIDENTS]
        if section.max_bytes is None:
            return self._table_configs(method, section.config(rate))
        all_ids = [
            table
            for table in self._table_configs(method, section.config(rate, fraction=1))
            if isinstance(table, CCEConfig)
        ]
        rows = sum(table.resident_row_bytes for table in all_ids)
        beside = sum(table.residency_bytes for table in all_ids)
        if section.max_bytes <= beside:
            raise ValueError(
                f"max_bytes={section.max_bytes} leaves nothing for rows: to know who has one takes {beside} bytes"
            )
        fraction = min(1.0, (section.max_bytes - beside) / max(rows, 1))
        return self._table_configs(method, section.config(rate, fraction))

    def _table_configs(self, method: Method | None, residents: ResidentConfig) -> list[EmbeddingBagConfig]:
        return tables_under_cap(
            self.full_tables(),
            method=method or self.embedding.method,
            max_parameters=self.embedding.max_parameters or 0,
            num_columns=self.embedding.num_columns,
            num_terms=self.embedding.num_terms,
            use_helper=self.embedding.use_helper,
            min_pointer_bits=self.embedding.min_pointer_bits,
            full_up_to=self.embedding.full_up_to,
            residents=residents,
            seed=self.seed,
        )

    @property
    def resident_settings(self) -> ResidentsSection:
        """The section `residents`, or what is usual without it."""
        return self.residents or ResidentsSection()

    @property
    def resident_rates(self) -> dict[str, float]:
        """The learning rates of the rows of residents and of the codewords that these are folded into."""
        section, usual = self.resident_settings, self.optimizer.embedding_learning_rate
        return {RESIDENTS: section.learning_rate or usual, CODEWORDS: section.codeword_learning_rate or usual / 10}

    def universes(self) -> dict[str, int]:
        """Feature → size of the universe of its table."""
        return {feature: table.num_embeddings for table in self.full_tables() for feature in table.feature_names}

    def as_dict(self) -> dict[str, Any]:
        """JSON values that `parse_config` makes the same configuration of."""
        values: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        # What older runs did not know is left out where it says nothing, so that their digests stay what they are.
        if self.residents is None:
            del values["residents"]
        else:
            if self.residents.max_bytes is None:
                del values["residents"]["max_bytes"]
            if self.residents.newcomers == 0:
                del values["residents"]["newcomers"]
        if self.embedding.full_up_to == 0:
            del values["embedding"]["full_up_to"]
        if self.derive is not None and self.derive.bits is None:
            del values["derive"]["bits"]
        if self.embedding.min_pointer_bits == 8:
            del values["embedding"]["min_pointer_bits"]
        return values


_ADAPTER = TypeAdapter(RunConfig)


def _preset(name: str) -> Mapping[str, int]:
    if name not in TABLE_PRESETS:
        allowed = ", ".join(map(repr, TABLE_PRESETS))
        message = f"{name!r} is no preset; allowed: {allowed}, or a section [tables]"
        error = InitErrorDetails(type=PydanticCustomError("value_error", message), loc=("tables",), input=name)
        raise ValidationError.from_exception_data(RunConfig.__name__, [error])
    return TABLE_PRESETS[name]


def config_digest(config: RunConfig) -> str:
    """SHA-256 (hex) of a configuration."""
    return hashlib.sha256(json.dumps(config.as_dict(), sort_keys=True).encode()).hexdigest()


def parse_config(values: dict[str, Any]) -> RunConfig:
    """A RunConfig from plain values, e.g. parsed TOML or JSON. Raises pydantic's ValidationError."""
    tables = values.get("tables")
    if isinstance(tables, str):
        tables = _preset(tables)
    if isinstance(tables, dict):
        spelled_out = {
            n: table if isinstance(table, dict) else {"num_embeddings": table} for n, table in tables.items()
        }
        values = {**values, "tables": spelled_out}
    # As JSON, because only there does strict mean what we want: "64" is no number, and a list may fill a tuple.
    return _ADAPTER.validate_json(json.dumps(values, default=str), strict=True)
