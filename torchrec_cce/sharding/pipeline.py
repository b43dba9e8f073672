"""What TorchRec's train pipelines need to know of maps: that batches ahead of the model belong to the map they met.

`TrainPipelineSparseDist(model, optimizer, device, pipeline_postproc=True)` runs the remap ahead of the model without
more ado. Two batches are then in flight, with rows of the current map.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_cce.errors import MapMismatchError
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.remap import Remap

Out = TypeVar("Out")


def drain(pipeline: TrainPipelineSparseDist[Any, Out]) -> list[Out]:
    """Train the batches in flight and let go of the model, so that it may be clustered, evaluated or saved.

    Every rank calls it. The next `progress` fills the pipeline anew.

    Returns:
        What `progress` would have returned for each of these batches, at most two; none where the iterator that
        `progress` was given has ended and its last batch is trained.
    """
    nothing: Iterator[Any] = iter(())
    outputs = []
    while pipeline.batches:
        outputs.append(pipeline.progress(nothing))
    pipeline.detach()
    return outputs


class RowCollate:
    """A data loader's `collate_fn` that remaps: ahead of the copy to the device, and in the loader's workers if any.

    The model takes batches of rows as they are. Rows mean nothing under another map, or in another phase of residents,
    than those they were looked up in, and a worker keeps those it was started with, so that a loader is iterated
    through `batches`, which checks. After a clustering, and after an admission, iterate anew.

    Args:
        collection: the one that the batches are for; sharded or not.
        collate: samples → `Batch` of raw IDs on the CPU.

    Example:
        >>> collate = RowCollate(collection, to_batch)                           # doctest: +SKIP
        >>> loader = DataLoader(log, batch_size=8192, collate_fn=collate)        # doctest: +SKIP
        >>> for batch in collate.batches(loader): ...                            # doctest: +SKIP
    """

    def __init__(self, collection: CCECollection, collate: Callable[[Any], Batch]) -> None:
        # A pipeline may have put a wrapper around the remap; it is to be the module that clusterings change.
        self._remap = next(module for module in collection.modules() if isinstance(module, Remap))
        self._collate = collate

    def __call__(self, samples: Any) -> tuple[Batch, torch.Tensor]:
        """The batch of rows of `samples`, and the stamp of what they are of."""
        batch = self._collate(samples)
        return replace(batch, sparse_features=self._remap(batch.sparse_features)), self._remap.stamp()

    def batches(self, loader: Iterable[tuple[Batch, torch.Tensor]]) -> Iterator[Batch]:
        """The batches of a loader that has this `collate_fn`.

        Raises:
            MapMismatchError: a batch was remapped before the collection's maps, or the phase of its residents, changed.
        """
        for batch, stamp in loader:
            if not torch.equal(stamp, self._remap.stamp()):
                raise MapMismatchError(
                    "the loader remapped a batch before the collection got another map or other residents; end its "
                    "iteration at a clustering or an admission and begin a new one after it, without persistent_workers"
                )
            yield batch
