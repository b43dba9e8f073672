"""`WordLookup`: pooled embeddings from words, whatever the words are made of and wherever the tables lie.

Both steps of it, packing and pooling, are custom operators of PyTorch. An operator has only tensors and numbers, so a
lookup has a number by which it is found.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cce.errors import ConfigError
from torchrec_cce.kernels.lookup.layout import Layout
from torchrec_cce.kernels.lookup.lookup import Lookup
from torchrec_cce.kernels.lookup.pack import Codes, Packer
from torchrec_cce.modules.buffers import Buffers
from torchrec_cce.modules.device_lookup import DeviceLookup, by_triton, sent
from torchrec_cce.modules.lookup_operators import numbered, pack, pool

Place = tuple[int, int]
"""Where a table is: the number of a tensor, and the floats before it in there."""
CPU = torch.device("cpu")
_FLOAT_BYTES = 4


class WordLookup(ABC):
    """A lookup of inputs with a certain number of features.

    Args:
        codes: how IDs of the features become words; a subclass may write further words.
        num_sources: how many features the input has.
        places: of each table of the layout.
        device: where the tables are, see `takes_words`. Words are packed on the CPU.
    """

    def __init__(
        self,
        layout: Layout,
        codes: Sequence[Codes],
        *,
        num_sources: int,
        places: Sequence[Place],
        device: torch.device = CPU,
    ) -> None:
        self.number = numbered(self)
        self.device = device
        self._on_device = DeviceLookup(layout, device) if by_triton(device) else None
        self.num_words, self.dim = layout.num_words, layout.dim
        self.buffers = Buffers()
        self._lookup = Lookup(layout, Packer(codes))
        self._num_sources = num_sources
        self._tensors = np.array([tensor for tensor, _ in places], np.int64)
        self._looked_up = [0] * (1 + max((tensor for tensor, _ in places), default=-1))
        for table, (tensor, _) in enumerate(places):
            self._looked_up[tensor] += layout.table_floats.get(table, 0)  # one without features is not looked up
        self._are_apart = list(places) == [(number, 0) for number in range(len(places))]
        self._starts = np.array([start * _FLOAT_BYTES for _, start in places], np.uint64)

    @abstractmethod
    def refuse(self, number: int, ids: npt.NDArray[np.integer], bounds: npt.NDArray[np.int64]) -> None:
        """Raise InvalidIDError: an ID of the feature with this number among `codes` is outside its table.

        Args:
            ids: [N], of all features.
            bounds: [sources + 1]: where in `N` each begins.
        """

    def __call__(self, features: KeyedJaggedTensor, tensors: Sequence[torch.Tensor], *, weighted: bool) -> torch.Tensor:
        """[B, Σ d] pooled embeddings.

        Args:
            tensors: [n, w] float32 each, what `places` speaks of.
            weighted: whether to take per-sample weights from `features`.
        """
        offsets, batch = features.offsets().long(), features.stride()
        words = self.words(features.values(), offsets, batch)
        sample_weights = features.weights().float().contiguous() if weighted else None
        if self._on_device is not None:
            offsets = sent(offsets, self.device)
            sample_weights = None if sample_weights is None else sent(sample_weights, self.device)
        pooled: torch.Tensor = pool(words, offsets, sample_weights, list(tensors), batch, self.number, self.dim)
        return pooled

    def look_up(
        self, ids: torch.Tensor, offsets: torch.Tensor, tensors: Sequence[torch.Tensor], batch: int
    ) -> torch.Tensor:
        """[B, Σ d] pooled embeddings without gradients, and without the time that operators of PyTorch take."""
        return self.pool(self.pack(ids.numpy(), offsets.numpy(), batch), offsets, None, tensors, batch)

    def words(self, ids: torch.Tensor, offsets: torch.Tensor, batch: int) -> torch.Tensor:
        """[W, N] int64, where the tables are: packed on the CPU, they go to a device in place of rows."""
        if self._on_device is None:
            words: torch.Tensor = pack(ids, offsets, batch, self.number, self.num_words)
            return words
        return sent(pack(ids.cpu(), offsets.cpu(), batch, self.number, self.num_words), self.device)

    def pack(self, ids: npt.NDArray[np.integer], offsets: npt.NDArray[np.int64], batch: int) -> torch.Tensor:
        """[W, N] int64 words. Raises InvalidIDError, ConfigError of bags that are none."""
        bounds = self.bounds(offsets, batch)
        shape = self.num_words, len(ids)
        if self.device.type == "cuda":  # memory that the device can read, and that PyTorch keeps for the next time
            words = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        else:
            words = self.buffers.empty(shape, torch.int64)
        _check(offsets, bounds, self._num_sources, len(ids))
        flat = words.numpy().view(np.uint64)
        number, _ = self._lookup.pack(ids, bounds, flat, num_threads=torch.get_num_threads())
        if number >= 0:
            self.refuse(number, ids, bounds)
        return words

    def bounds(self, offsets: npt.NDArray[np.int64], batch: int) -> npt.NDArray[np.int64]:
        """[sources + 1]: where the values of each feature begin."""
        return offsets[::batch] if batch else np.zeros(self._num_sources + 1, np.int64)

    def pool(
        self,
        words: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
        tables: Sequence[torch.Tensor],
        batch: int,
    ) -> torch.Tensor:
        """[B, Σ d] float32."""
        if self._on_device is not None:
            return self._on_device.pool(self._addresses(tables), words, offsets, weights, batch)
        out = self.buffers.empty((batch, self.dim), torch.float32)
        self._lookup.pool(
            self._addresses(tables),
            words.numpy().view(np.uint64),
            offsets.numpy(),
            None if weights is None else weights.numpy(),
            out.numpy(),
            num_threads=torch.get_num_threads(),
        )
        return out

    def gradients(
        self,
        gradient: torch.Tensor,
        words: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
        rows: Sequence[int],
        widths: Sequence[int],
    ) -> list[torch.Tensor]:
        """Of each tensor, `[rows, width]`; of those with -1 rows, which want none, `[0]`."""
        if self._on_device is not None:
            sizes = [max(num_rows, 0) * width for num_rows, width in zip(rows, widths, strict=True)]
            flat = gradient.new_zeros(sum(sizes)).split(sizes)  # one kernel in place of one for each
            shapes = [
                (num_rows, width) if num_rows >= 0 else (0,) for num_rows, width in zip(rows, widths, strict=True)
            ]
            found = [part.view(shape) for part, shape in zip(flat, shapes, strict=True)]
            self._on_device.add_gradients(self._addresses(found), words, offsets, weights, gradient.contiguous())
            return found
        found = [
            self.buffers.empty((num_rows, width), torch.float32) if num_rows >= 0 else torch.empty(0)
            for num_rows, width in zip(rows, widths, strict=True)
        ]
        for tensor, written in zip(found, self._looked_up, strict=True):
            if tensor.numel() > written:  # there is more in it than tables of ours
                tensor.zero_()
        self._lookup.sum_gradients(
            self._addresses(found),
            words.numpy().view(np.uint64),
            offsets.numpy(),
            None if weights is None else weights.numpy(),
            gradient.contiguous().numpy(),
            num_threads=torch.get_num_threads(),
        )
        return found

    def _addresses(self, tensors: Sequence[torch.Tensor]) -> npt.NDArray[np.uint64]:
        """Of each table; 0 where its tensor is empty."""
        first = np.array([tensor.data_ptr() for tensor in tensors], np.uint64)
        if self._are_apart:
            return first
        first = first[self._tensors]
        return np.where(first == 0, first, first + self._starts)


def _check(offsets: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64], num_sources: int, num_ids: int) -> None:
    """The compiled loops read what offsets point at."""
    inside = len(bounds) == num_sources + 1 and bounds[0] >= 0 and bounds[-1] <= num_ids
    if not inside or bool((offsets[1:] < offsets[:-1]).any()):
        raise ConfigError(
            f"bags of {num_sources} features with offsets {offsets[:3].tolist()} … {offsets[-3:].tolist()} do not "
            f"divide {num_ids} IDs; offsets begin at 0 and never fall, lengths are not negative"
        )
