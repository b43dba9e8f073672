"""`TensorMap`: what raw IDs get from a pointer map, by operations of torch alone."""

import warnings

import numpy as np
import numpy.typing as npt
import torch

from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.methods.table import within
from torchrec_cce.methods.tensor_hash import Constant, TensorHash


class TensorMap:
    """The rule of `PointerMap.resolve`, with the pointers as a constant tensor.

    Args:
        use_helper: whether helper codes are wanted, too.
    """

    def __init__(self, pointer_map: PointerMap, *, use_helper: bool) -> None:
        self._map = pointer_map
        self._codebook = TensorHash(pointer_map.codebook_hash)
        self._helper = TensorHash(pointer_map.helper_hash) if use_helper else None
        has_pointers = pointer_map.stored is not None and pointer_map.num_ids > 0
        self._pointers = _constant(pointer_map.stored_view) if has_pointers else None
        self._keys = None if pointer_map.vocabulary is None else _SortedKeys(pointer_map.vocabulary)

    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes of codebook and helper, `[c, N, 2]` or without helper `[c, N, 1]` int64, of raw `ids: [N] int64`.

        Returns:
            The codes, and [N] which IDs the map knows; None if it has something for all.
        """
        known: torch.Tensor | None
        positions, known = (ids, within(ids, self._map.num_ids)) if self._keys is None else self._keys(ids)
        if self._map.unseen == "first_row":
            ids = torch.where(known, ids, self._map.first_id)
            positions = torch.where(known, positions, 0)
        terms = [self._codebook_codes(ids, positions, known)]
        if self._helper is not None:
            terms.append(self._helper(ids))
        return torch.stack(terms, dim=2).transpose(0, 1), known if self._map.unseen == "error" else None

    def _codebook_codes(self, ids: torch.Tensor, positions: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """[N, c] int64."""
        if self._pointers is None:
            return self._codebook(ids)
        form, last = self._map.pointer_format, self._map.num_ids - 1
        stored = self._pointers.on(ids.device)[positions.clamp(0, last)].to(torch.int64)  # [N, width]
        if form.nibbles:
            codes = torch.stack([stored & 15, (stored >> 4) & 15], dim=2).flatten(1)[:, : form.num_columns]
        else:
            codes = stored & 2**form.bits - 1
        if self._map.unseen != "hash":
            return codes
        return torch.where(known[:, None], codes, self._codebook(ids))


class _SortedKeys:
    """The positions of the raw IDs of a vocabulary, by bisection: 16 bytes a key."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        keys = vocabulary.keys()
        order = np.argsort(keys)
        self._keys, self._positions = _constant(keys[order]), _constant(order)
        self._last = len(keys) - 1

    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions `[N] int64` of `ids: [N] int64`, and `[N]` which have one."""
        if self._last < 0:
            return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        keys = self._keys.on(ids.device)
        nearest = torch.searchsorted(keys, ids).clamp(0, self._last)
        return self._positions.on(ids.device)[nearest], keys[nearest] == ids


def _constant(numbers: npt.NDArray[np.integer]) -> Constant:
    """Unsigned numbers of more than 8 bits, which torch does little with, as signed ones of the same bits."""
    signed = numbers if numbers.dtype.itemsize == 1 else numbers.view(f"i{numbers.dtype.itemsize}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that cannot be written to, which nothing does
        return Constant(torch.from_numpy(signed))
