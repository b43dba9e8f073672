"""The keys of remapped features: their order, and the mark of what the rows under them are of."""

from collections.abc import Sequence, Set

from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.methods.cce import CCEConfig, CCEEmbeddingConfig
from torchrec_cce.methods.table import CompressedConfig, row_feature_names


class MarkedKey(str):
    """A key of remapped features that knows what their rows are of.

    It equals the plain key for everybody else. Features keep their keys as objects whatever is done to them: copied to
    a device, pinned, split, permuted, pickled on the way from a data loader's worker.
    """

    mark: int
    """The same as long as a raw ID has the same rows."""

    def __new__(cls, key: str, mark: int) -> "MarkedKey":
        marked = super().__new__(cls, key)
        marked.mark = mark
        return marked

    def __reduce__(self) -> tuple[type["MarkedKey"], tuple[str, int]]:
        return type(self), (str(self), self.mark)


class WordKey(MarkedKey):
    """A key of words, see `WordForm`: the mark is of the maps of its own feature."""


def marked_keys(keys: Sequence[str], mark: int) -> list[str]:
    """`keys` with the mark on the first, so that others stay what they are."""
    return [MarkedKey(key, mark) if i == 0 else str(key) for i, key in enumerate(keys)]


def check_mark(keys: Sequence[str], own: Sequence[str]) -> None:
    """Raise MapMismatchError if rows under `keys` are of other maps or residents than those that `own` is marked with.

    Keys that somebody made from their names alone have no mark, and pass.
    """
    if not keys or not isinstance(keys[0], MarkedKey):
        return
    theirs, ours = (getattr(each[0], "mark", 0) for each in (keys, own))
    if theirs != ours:
        raise MapMismatchError(
            f"the features were remapped under other maps or other residents (mark {theirs:x}) than those attached "
            f"now ({ours:x}): their rows mean nothing here. Remap the raw IDs again; end the iteration of a loader "
            "that remaps, and drain a pipeline, before a clustering or an admission"
        )


def in_segments(tables: Sequence[BaseEmbeddingConfig]) -> list[BaseEmbeddingConfig]:
    """`tables` in the order of their keys: those of one stock collection lie side by side, see `row_segments`."""
    return sorted(tables, key=_segment)


def row_features_of(in_order: Sequence[BaseEmbeddingConfig], *, with_weights: bool) -> list[tuple[str, str]]:
    """(table, feature) of all rows, in the order of their keys.

    Several full tables that read one feature read the same rows, under one key. The table of fewest rows stands for
    them: it refuses every ID that one of them lacks.

    Args:
        with_weights: whether rows get weights, by which means are pooled, too.

    Raises:
        ConfigError: weights that would have to be those of a mean and of a sum.
    """
    readers: dict[str, list[BaseEmbeddingConfig]] = {}
    features = []
    for table in in_order:
        for feature in table.feature_names:
            if isinstance(table, CompressedConfig):
                features.append((table.name, feature))
                continue
            readers.setdefault(feature, []).append(table)
            if len(readers[feature]) == 1:
                features.append(("", feature))
    for feature, tables in readers.items():
        if with_weights and len({getattr(table, "pooling", None) for table in tables}) > 1:
            names = [table.name for table in tables]
            raise ConfigError(
                f"feature {feature!r} is read by the full tables {names}, some of which pool by the mean, some by the "
                "sum; beside signed tables or residents, give each kind a collection of its own"
            )
    fewest = {feature: min(tables, key=lambda table: table.num_embeddings).name for feature, tables in readers.items()}
    return [(table or fewest[feature], feature) for table, feature in features]


def row_keys_of(in_order: Sequence[BaseEmbeddingConfig], tables: Set[str] | None = None) -> list[str]:
    """The keys of remapped features: columns, slots of residents, and places of those that are not pooled.

    Args:
        tables: whose columns; None = of all.
    """
    with_residents = [table for table in in_order if isinstance(table, CCEConfig) and table.residents is not None]
    in_sequences = [table for table in with_residents if isinstance(table, CCEEmbeddingConfig)]
    return [
        *_distinct([table for table in in_order if tables is None or table.name in tables]),
        *(key for table in with_residents for key in table.resident_feature_names()),
        *(key for table in in_sequences for key in table.place_feature_names()),
    ]


def row_segments(tables: Sequence[BaseEmbeddingConfig]) -> tuple[int, int, int, int]:
    """How many keys of remapped features lie side by side: those of tables without residents, of the codewords of
    tables with residents, of residents' rows that are stock tables, and of those that are quantized."""
    lengths = [0, 0, 0, 0]
    lengths[0] = len(_distinct([table for table in tables if _segment(table) == 0]))
    for table in tables:
        segment = _segment(table)
        if segment > 0:
            lengths[1] += len(row_feature_names(table))
        if isinstance(table, CCEConfig) and table.residents is not None:
            lengths[1 + segment] += len(table.resident_feature_names())
    return lengths[0], lengths[1], lengths[2], lengths[3]


def _distinct(tables: Sequence[BaseEmbeddingConfig]) -> dict[str, None]:
    return dict.fromkeys(key for table in tables for key in row_feature_names(table))


def _segment(table: BaseEmbeddingConfig) -> int:
    """0 without residents, 1 where their rows are a stock table, 2 where they are quantized."""
    if not isinstance(table, CCEConfig) or table.residents is None:
        return 0
    return 1 if table.has_stock_residents else 2
