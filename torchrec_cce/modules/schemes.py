"""`Schemes`: what raw IDs are to each table of a collection: rows, or words; which are refused, which are unseen."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_cce.errors import ConfigError, InvalidIDError
from torchrec_cce.kernels.lookup.layout import FeatureTable
from torchrec_cce.kernels.packed import hashed_words
from torchrec_cce.maps.pointer_format import PointerFormat
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.methods.cce import CCEScheme
from torchrec_cce.methods.compositional import HashedScheme
from torchrec_cce.methods.table import PointerScheme, scheme_of


class Schemes(nn.Module):
    """Of some tables, without parameters.

    Args:
        tables: one configuration per table.
    """

    def __init__(self, tables: Sequence[BaseEmbeddingConfig]) -> None:
        super().__init__()
        self._configs = {table.name: table for table in tables}
        self.schemes: dict[str, PointerScheme] = {table.name: scheme_of(table) for table in tables}
        self._unseen = dict.fromkeys(self.cce_tables(), 0)

    def config(self, table: str) -> BaseEmbeddingConfig:
        return self._configs[table]

    def pointer_map(self, table: str) -> PointerMap:
        scheme = self.schemes.get(table)
        if not isinstance(scheme, CCEScheme):
            raise ConfigError(f"{table!r} is not a CCE table; those are: {', '.join(self.cce_tables()) or 'none'}")
        return scheme.pointer_map

    def cce_tables(self) -> list[str]:
        return [name for name, scheme in self.schemes.items() if isinstance(scheme, CCEScheme)]

    def unseen_ids(self) -> dict[str, int]:
        return dict(self._unseen)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def look_up(
        self, table: str, feature: str, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.int64]:
        """The rows of raw `ids: [N] int64` of one feature of a table, `[c, N, t] int64`: what the remap does for each.

        Args:
            out: of that shape, to write to and return; None = a new array.

        Raises:
            InvalidIDError: an ID outside the table's universe.
        """
        scheme = self.schemes[table]
        if out is None:
            out = np.empty((scheme.num_columns, len(ids), scheme.num_terms), np.int64)
        looked = scheme.rows_into(ids, out)
        self._note(table, feature, ids, looked.bad, looked.unseen)
        return out

    def look_up_words(
        self, table: str, feature: str, ids: npt.NDArray[np.int64], shape: FeatureTable
    ) -> Sequence[npt.NDArray[np.uint64]]:
        """`look_up` as the words of `shape`, [N] each: codes of a map or of hashes, or the rows themselves."""
        scheme = self.schemes[table]
        if isinstance(scheme, CCEScheme):
            form = PointerFormat(num_columns=shape.num_columns, bits=shape.bits)
            words, found = scheme.pointer_map.uint64s(ids, form, helper=scheme.use_helper)
            self._note(table, feature, ids, found.bad, found.num_unseen)
            return words
        if isinstance(scheme, HashedScheme):
            if scheme.num_ids is not None:
                outside = ids.view(np.uint64) >= np.uint64(scheme.num_ids)
                self._note(table, feature, ids, int(outside.argmax()) if outside.any() else -1, 0)
            return [word for term in scheme.terms for word in hashed_words(ids, term, shape.bits)]
        rows = self.look_up(table, feature, ids).transpose(2, 0, 1)
        return list(rows.reshape(shape.num_words, len(ids)).view(np.uint64))

    def _note(self, table: str, feature: str, ids: npt.NDArray[np.int64], bad: int, unseen: int) -> None:
        """Refuse the ID at `bad`, unless it is -1; count those that are unseen."""
        if bad >= 0:
            raise InvalidIDError(
                f"feature {feature!r}: raw ID {ids[bad]} (position {bad} of its {len(ids)} values) "
                f"is not {self.universe(table)}"
            )
        if unseen:
            self._unseen[table] += unseen

    def universe(self, table: str) -> str:
        """Which IDs a table takes, and what to do about others."""
        scheme = self.schemes[table]
        if isinstance(scheme, CCEScheme) and scheme.pointer_map.vocabulary is not None:
            known = scheme.pointer_map.num_ids
            return (
                f'among the {known} of the vocabulary of table {table!r}; give its map unseen="hash" or add the ID to '
                "the vocabulary"
            )
        last = self._configs[table].num_embeddings - 1
        return (
            f"in 0..{last}, the universe of table {table!r}; raise num_embeddings or bring raw IDs into the universe "
            "first"
        )
