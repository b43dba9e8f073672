"""`WordForm`: remapped data as they were read, words of codes, in a KeyedJaggedTensor that a collection takes.

Words are fewer than rows, and the packed lookup reads them as they are. As a KeyedJaggedTensor they go wherever raw IDs
and rows do: through pipelines, from a loader's workers, into pinned memory.
"""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_cce.errors import ConfigError, InvalidIDError, MapMismatchError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.kernels.lookup.layout import FeatureTable, Layout
from torchrec_cce.kernels.lookup.pack import largest_code
from torchrec_cce.methods.cce import CCEScheme
from torchrec_cce.methods.table import PointerScheme
from torchrec_cce.modules.feature_words import remapped_form, shapes_of
from torchrec_cce.modules.row_keys import WordKey


class WordForm:
    """How words of all `F` features of a collection lie side by side, under the maps that it has.

    An ID has up to `W` words, those of one table after those of another, as `Layout` says. Key number `w·F + f` is of
    word `w` of feature `f`, so that the values are `words: [W, N]`, end to end; where a feature has fewer words,
    nobody reads what is there. Bags have the same lengths under the keys of a feature.

    Args:
        tables: in the order of the collection; none signed or computed.
        schemes: of the tables.
    """

    def __init__(self, tables: Sequence[BaseEmbeddingConfig], schemes: Mapping[str, PointerScheme]) -> None:
        self.table_features = [(table.name, feature) for table in tables for feature in table.feature_names]
        """(table, feature) in the order of the layout."""
        self.features = list(dict.fromkeys(feature for _, feature in self.table_features))
        self._shapes = shapes_of([(table, schemes[table.name]) for table in tables], self.features, remapped_form)
        self.layout = Layout.of(self._shapes)
        marks = [self._mark(feature, schemes) for feature in self.features]
        self.keys = [
            WordKey(f"{feature}#word.{word}", mark)
            for word in range(self.layout.num_words)
            for feature, mark in zip(self.features, marks, strict=True)
        ]
        """Of the KeyedJaggedTensor, each with the mark of the maps that its feature's words are of."""

    def tables_of(self, feature: str) -> list[str]:
        """Those that read it, in the order in which their words follow each other."""
        return [table for table, other in self.table_features if other == feature]

    def _mark(self, feature: str, schemes: Mapping[str, PointerScheme]) -> int:
        found = [schemes[table] for table in self.tables_of(feature)]
        return derive_seed(*(scheme.pointer_map.digest for scheme in found if isinstance(scheme, CCEScheme)))

    def check(self, keys: Sequence[str]) -> None:
        """Raise MapMismatchError if words under `keys` are of other maps, ConfigError if of another collection."""
        if keys != self.keys:
            raise ConfigError(
                f"the words are under keys {list(keys)}, those of this collection under {self.keys}; read the remapped "
                "files with its own remap"
            )
        for number, (theirs, ours) in enumerate(zip(keys, self.keys, strict=True)):
            if getattr(theirs, "mark", None) != ours.mark:
                feature = self.features[number % len(self.features)]
                raise MapMismatchError(
                    f"feature {feature!r}: its words are of other maps than those attached now to "
                    f"{self.tables_of(feature)}, and mean nothing here. Read the remapped files again, with the "
                    "collection's remap; they need the version that they were remapped with"
                )

    def words(self, values: torch.Tensor, offsets: torch.Tensor, batch: int) -> torch.Tensor:
        """[W, N] int64: the words of a KeyedJaggedTensor with these keys.

        Args:
            values: [W · N] int64, on the CPU.
            offsets: [W · F · batch + 1] int64.

        Raises:
            ConfigError: bags that are none, or not the same for each word of an ID.
            InvalidIDError: a code that its table does not have.
        """
        num_words, num_bags, flat = self.layout.num_words, len(self.features) * batch, offsets.numpy()
        size, rest = divmod(values.numel(), num_words)
        ends = size * np.arange(num_words + 1)
        # The compiled loops read what offsets point at.
        if (
            rest
            or len(flat) != num_words * num_bags + 1
            or not np.array_equal(flat[:: max(1, num_bags)][: num_words + 1], ends[: 1 if not num_bags else None])
            or bool((flat[1 : num_bags + 1] < flat[:num_bags]).any())
        ):
            raise ConfigError(
                f"{values.numel()} values and {len(flat) - 1} bags are not those of {num_words} words an ID of "
                f"{len(self.features)} features in a batch of {batch}; make words by RemappedLog.to_words"
            )
        found = values.contiguous().view(num_words, size)
        self._check_codes(found.numpy().view(np.uint64), flat[: num_bags + 1 : max(1, batch)])
        return found

    def _check_codes(self, words: npt.NDArray[np.uint64], bounds: npt.NDArray[np.int64]) -> None:
        """The compiled loops read, and write to, the rows that words say.

        Args:
            bounds: [F + 1]: where in `words: [W, N]` each feature begins.
        """
        for (table, feature), shape, first in zip(
            self.table_features, self._shapes, self.layout.first_words, strict=True
        ):
            limit = shape.term_rows or shape.table_rows
            if limit >= 2**shape.bits or len(bounds) <= shape.source + 1:
                continue
            mine = words[first : first + shape.num_words, bounds[shape.source] : bounds[shape.source + 1]]
            for word, shift in product(range(shape.num_words), range(0, 64, shape.bits)):
                column = word % shape.words_a_term * (64 // shape.bits) + shift // shape.bits
                if column < shape.num_columns:
                    largest = largest_code(mine[word], np.uint64(shift), np.uint64(2**shape.bits - 1))
                    if largest >= limit:
                        raise InvalidIDError(
                            f"feature {feature!r}: its words say row {largest} in column {column} of table {table!r}, "
                            f"where 0..{limit - 1} are; they were changed after RemappedLog.to_words has made them"
                        )

    def rows(self, words: npt.NDArray[np.uint64], table: str, feature: str) -> npt.NDArray[np.int64]:
        """[c, n, t]: the rows of the physical table that words say.

        Args:
            words: [W, n], of the IDs of the feature.
        """
        number = self.table_features.index((table, feature))
        shape, first = self._shapes[number], self.layout.first_words[number]
        rows = np.empty((shape.num_columns, words.shape[1], shape.num_terms), np.int64)
        codes_a_word, mask = 64 // shape.bits, np.uint64(2**shape.bits - 1)
        for column in range(shape.num_columns):
            word, place = divmod(column, codes_a_word)
            for term in range(shape.num_terms):
                codes = words[first + term * shape.words_a_term + word] >> np.uint64(place * shape.bits) & mask
                rows[column, :, term] = codes.view(np.int64) + column * shape.column_rows + term * shape.term_rows
        return rows

    def shape(self, table: str, feature: str) -> FeatureTable:
        return self._shapes[self.table_features.index((table, feature))]
