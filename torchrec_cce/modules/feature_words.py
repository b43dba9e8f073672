"""How the IDs of a table's feature become words that the packed lookup reads: their layout, and the codes in them."""

from collections.abc import Callable, Sequence
from typing import Any

from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_cce.kernels.lookup.layout import FeatureTable
from torchrec_cce.kernels.lookup.pack import Codes
from torchrec_cce.maps.pointer_format import PointerFormat
from torchrec_cce.methods.cce import CCEScheme
from torchrec_cce.methods.compositional import CompositionalConfig, HashedScheme
from torchrec_cce.methods.table import FullScheme, PointerScheme
from torchrec_cce.modules.row_weights import pools_by_mean


def rows_and_width(config: BaseEmbeddingConfig) -> tuple[int, int]:
    """Of the physical table."""
    stock = config.physical() if isinstance(config, CompositionalConfig) else config
    return int(stock.num_embeddings), int(stock.embedding_dim)


def stored_form(scheme: PointerScheme) -> PointerFormat | None:
    """Of the codes of a CCE table in words that are made of raw IDs: as they are stored; None for other tables."""
    if not isinstance(scheme, CCEScheme):
        return None
    pointer_map = scheme.pointer_map
    return pointer_map.word_format if pointer_map.stored is None else pointer_map.pointer_format


def remapped_form(scheme: PointerScheme) -> PointerFormat | None:
    """Of the codes of a CCE table in the words of remapped data: in the fewest bits; None for other tables."""
    return scheme.pointer_map.word_format if isinstance(scheme, CCEScheme) else None


def shapes_of(
    tables: Sequence[tuple[BaseEmbeddingConfig, PointerScheme]],
    sources: Sequence[str],
    form_of: Callable[[PointerScheme], PointerFormat | None],
) -> list[FeatureTable]:
    """The features of tables, one table after the other.

    Args:
        sources: the features of the input.
        form_of: `stored_form` or `remapped_form`.
    """
    return [
        _shape(config, scheme, form_of(scheme), number, sources.index(feature))
        for number, (config, scheme) in enumerate(tables)
        for feature in config.feature_names
    ]


def _shape(
    config: BaseEmbeddingConfig, scheme: PointerScheme, form: PointerFormat | None, number: int, source: int
) -> FeatureTable:
    common: dict[str, Any] = {
        "table": number,
        "source": source,
        "width": config.embedding_dim // scheme.num_columns,
        "is_mean": pools_by_mean(config),
        "table_rows": rows_and_width(config)[0],
        "num_columns": scheme.num_columns,
        "num_terms": scheme.num_terms,
    }
    if isinstance(scheme, CCEScheme):
        assert form is not None
        k = scheme.pointer_map.num_rows
        return FeatureTable(**common, bits=form.bits, column_rows=2 * k, term_rows=k)
    if isinstance(scheme, HashedScheme):
        k, terms = scheme.terms[0].num_rows, scheme.num_terms
        bits = PointerFormat.that_holds(k, num_columns=scheme.num_columns).bits
        return FeatureTable(**common, bits=bits, column_rows=terms * k, term_rows=k)
    return FeatureTable(**common, bits=64, column_rows=0, term_rows=0)  # a code is a row


def codes_of(scheme: PointerScheme, shape: FeatureTable, first_word: int) -> Codes | None:
    """How raw IDs become codes in one pass with others; None where `Schemes.look_up_words` says it."""
    common: dict[str, Any] = {"source": shape.source, "first_word": first_word, "bits": shape.bits}
    if isinstance(scheme, CCEScheme):
        pointer_map = scheme.pointer_map
        if pointer_map.takes_any_id:
            return None
        helper = [pointer_map.helper_hash] if scheme.use_helper else []
        if pointer_map.stored is None:
            hashes = [pointer_map.codebook_hash, *helper]
            return Codes(**common, num_ids=pointer_map.num_ids, hashes=hashes)
        return Codes(**common, num_ids=pointer_map.num_ids, pointers=pointer_map.stored_view, hashes=helper)
    if isinstance(scheme, HashedScheme):
        return Codes(**common, num_ids=scheme.num_ids, hashes=scheme.terms)
    return Codes(**common, num_ids=scheme.num_ids) if isinstance(scheme, FullScheme) else None
