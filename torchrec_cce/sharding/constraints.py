"""What TorchRec's planner must be told of a compressed table: it sees columns, where the user described features."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import TypeVar

from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.methods.compositional import CompositionalConfig
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection
from torchrec_cce.sharding.sharders import FUSED_WIDTH, SHARDING_TYPES, has_fused_kernel

T = TypeVar("T")
_NOTHING = ParameterConstraints()
_FLOATS_A_ROW = 16
"""Of tables, for each row that a batch looks up, up to which replicas on one rank are faster than fused kernels. The
optimizer of replicas visits all rows of a table at every step; what they save is the sort of rows that are looked up.
DLRM steps of 26 tables with rowwise Adagrad take 0.74 to 0.85 of the time at 16, and 0.9 to 1.1 at 32.
"""


def column_constraints(
    tables: Sequence[BaseEmbeddingConfig], given: Mapping[str, ParameterConstraints] | None = None
) -> dict[str, ParameterConstraints]:
    """The constraints of the physical tables of `tables`, one of each name.

    A feature of `l` raw IDs a row is `c` column features of `t·l` rows, of which the planner would expect one of one.
    A table whose columns no fused kernel can read is replicated; every other one may be replicated, placed on a rank,
    or split by rows over all ranks or those of a host.

    Args:
        given: table → what the user knows and wants, in TorchRec's terms: values a feature, one for each of
            `feature_names` or one for all, e.g. `ParameterConstraints(pooling_factors=[20.0])` for bags of 20 raw IDs.
            The rows of a table's residents are a table, too; what is said of the table holds for them, unless they are
            named.

    Raises:
        ConfigError: constraints of an unknown table, of another number of features than it has, or that leave no
            placement.
    """
    given = given or {}
    owners = {table.name: table.name for table in tables}
    rows = [table for table in tables if isinstance(table, CCEConfig) and table.has_stock_residents]
    owners |= {table.resident_table: table.name for table in rows}
    unknown = set(given) - owners.keys()
    if unknown:
        raise ConfigError(f"constraints of {sorted(unknown)}; the tables are {', '.join(sorted(owners))}")
    return {
        table.name: _constraints_of(table, given.get(table.name) or given.get(owners[table.name], _NOTHING))
        for table in (*tables, *(table.resident_rows() for table in rows))
    }


def constraints_of_one_rank(
    given: Mapping[str, ParameterConstraints], replicated: Set[str]
) -> dict[str, ParameterConstraints]:
    """Tables `replicated`, and all others placed on the only rank there is, if they may be.

    It sends nothing: to replicate some beside others would only cost a second kernel.
    """
    kinds = {name: ShardingType.DATA_PARALLEL if name in replicated else ShardingType.TABLE_WISE for name in given}
    return {
        name: replace(each, sharding_types=[kinds[name].value])
        if kinds[name].value in (each.sharding_types or ())
        else each
        for name, each in given.items()
    }


def small_collections(module: nn.Module, given: Mapping[str, ParameterConstraints], batch_size: int) -> Set[str]:
    """The tables of collections in `module` that one CPU looks up faster if all of them are replicas, as they may be.

    Args:
        given: of each table of `module`, see `column_constraints`.
        batch_size: rows of a batch.
    """
    collections = [each for each in module.modules() if isinstance(each, CCEEmbeddingBagCollection)]
    stocks = [each for each in module.modules() if isinstance(each, EmbeddingBagCollection | EmbeddingCollection)]
    stocks = [each for each in stocks if each not in collections]  # restored ones are both
    small = [each.ebc for each in collections if each.is_packable and _is_small(each.ebc, given, batch_size)]
    others = {name for stock in stocks if stock not in small for name in _weights(stock)}
    return {name for stock in small if others.isdisjoint(_weights(stock)) for name in _weights(stock)}


def _is_small(stock: EmbeddingBagCollection, given: Mapping[str, ParameterConstraints], batch_size: int) -> bool:
    dense, replicated = EmbeddingComputeKernel.DENSE.value, ShardingType.DATA_PARALLEL.value
    weights = _weights(stock)
    constraints = [given[name] for name in weights]
    if not all(replicated in (each.sharding_types or ()) for each in constraints):
        return False
    if not all(dense in (each.compute_kernels or [dense]) for each in constraints):
        return False
    rows = batch_size * sum(sum(each.pooling_factors) for each in constraints)
    return sum(weight.numel() for weight in weights.values()) <= _FLOATS_A_ROW * rows


def _weights(stock: EmbeddingBagCollection | EmbeddingCollection) -> dict[str, nn.Parameter]:
    """Of each table, by its name."""
    return {name.split(".")[-2]: weight for name, weight in stock.named_parameters()}


def _constraints_of(table: BaseEmbeddingConfig, given: ParameterConstraints) -> ParameterConstraints:
    compositional = isinstance(table, CompositionalConfig)
    c, t = (table.num_columns, table.num_codewords) if compositional else (1, 1)
    width = table.embedding_dim // c
    lengths = _by_column(table, "pooling_factors", given.pooling_factors, c)
    poolings = given.num_poolings
    batches = given.batch_sizes
    return replace(
        given,
        sharding_types=_sharding_types(table, width, given),
        compute_kernels=given.compute_kernels if has_fused_kernel(width) else [EmbeddingComputeKernel.DENSE.value],
        pooling_factors=[t * length for length in lengths],
        num_poolings=None if poolings is None else _by_column(table, "num_poolings", poolings, c),
        batch_sizes=None if batches is None else _by_column(table, "batch_sizes", batches, c),
        feature_names=table.row_feature_names() if compositional else list(table.feature_names),
    )


def _by_column(table: BaseEmbeddingConfig, name: str, values: Sequence[T], num_columns: int) -> list[T]:
    """A value for each column feature, from one for each feature or one for all: `[20, 3]` → `[20, 20, 3, 3]`."""
    num_features = len(table.feature_names)
    if len(values) not in (1, num_features):
        raise ConfigError(
            f"table {table.name!r}: {name}={list(values)} has {len(values)} values; the table has {num_features} "
            f"features, {', '.join(table.feature_names)}. Give one for each, or one for all"
        )
    each = list(values) * num_features if len(values) == 1 else values
    return [value for value in each for _ in range(num_columns)]


def _sharding_types(table: BaseEmbeddingConfig, width: int, given: ParameterConstraints) -> list[str]:
    allowed = list(SHARDING_TYPES) if has_fused_kernel(width) else [ShardingType.DATA_PARALLEL.value]
    wanted = given.sharding_types or allowed
    chosen = [kind for kind in allowed if kind in wanted]
    if not chosen:
        why = (
            "tables are not split by columns, because rowwise Adagrad would keep one momentum for each part of a row"
            if has_fused_kernel(width)
            else f"FBGEMM's fused kernels read rows of a multiple of {FUSED_WIDTH} floats, and these have {width}: "
            "give the table fewer columns, or replicate it"
        )
        raise ConfigError(
            f"table {table.name!r}: sharding_types={list(wanted)} allows none of {', '.join(allowed)}; {why}"
        )
    return chosen
