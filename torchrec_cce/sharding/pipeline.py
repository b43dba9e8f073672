"""What TorchRec's train pipelines need to know of maps: that batches ahead of the model belong to the map they met.

`TrainPipelineSparseDist(model, optimizer, device, pipeline_postproc=True)` runs the remap ahead of the model without
more ado. Two batches are then in flight, with rows of the current map.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.remap import Remap

Out = TypeVar("Out")
Samples = TypeVar("Samples")


def drain(pipeline: TrainPipelineBase[Any, Out] | TrainPipelineSparseDist[Any, Out]) -> list[Out]:
    """Train the batches in flight and let go of the model, so that it may be clustered, evaluated or saved.

    Every rank calls it. The next `progress` fills the pipeline anew.

    Args:
        pipeline: a `TrainPipelineSparseDist` or a class derived from it; or a `TrainPipelineBase`, which reads one
            batch ahead and leaves the model as it is.

    Returns:
        What `progress` would have returned for each of these batches, of a `TrainPipelineSparseDist` at most two; none
        where the iterator that `progress` was given has ended and its last batch is trained.
    """
    nothing: Iterator[Any] = iter(())
    outputs = []
    if isinstance(pipeline, TrainPipelineBase):
        with suppress(StopIteration):
            while True:
                outputs.append(pipeline.progress(nothing))
        pipeline.reset()  # it remembers that an iterator has ended
    else:
        while pipeline.batches:
            outputs.append(pipeline.progress(nothing))
        pipeline.detach()
    return outputs


class RowCollate(Generic[Samples]):
    """A data loader's `collate_fn` that remaps: ahead of the copy to the device, and in the loader's workers if any.

    The model takes batches of rows as they are. Rows mean nothing under another map, or in another phase of residents,
    than those they were looked up in, and a worker keeps those it was started with, so that a loader is iterated
    through `batches`, which checks. After a clustering, and after an admission, iterate anew.

    Args:
        collection: the one that the batches are for; sharded or not.
        collate: samples → a batch of raw IDs on the CPU: TorchRec's `Batch`, any other object with attributes, a tuple,
            a dict, or a KeyedJaggedTensor itself. Those KeyedJaggedTensors in it that have all features of the
            collection are remapped; what else it has stays.

    Example:
        >>> collate = RowCollate(collection, to_batch)                           # doctest: +SKIP
        >>> loader = DataLoader(log, batch_size=8192, collate_fn=collate)        # doctest: +SKIP
        >>> for batch in collate.batches(loader): ...                            # doctest: +SKIP
    """

    def __init__(self, collection: CCECollection, collate: Callable[[Any], Samples]) -> None:
        # A pipeline may have put a wrapper around the remap; it is to be the module that clusterings change.
        self._remap = next(module for module in collection.modules() if isinstance(module, Remap))
        self._collate = collate

    def __call__(self, samples: Any) -> tuple[Samples, torch.Tensor]:
        """The batch of rows of `samples`, and the stamp of what they are of.

        Raises:
            ConfigError: nothing in the batch has the features of the collection.
        """
        batch = self._collate(samples)
        rows = self._rows_of(batch, is_whole=True)
        if rows is batch:
            features = sorted({feature for _, feature in self._remap.table_features})
            raise ConfigError(
                f"no KeyedJaggedTensor in the batch, a {type(batch).__name__}, has all features {features} of the "
                "collection; let collate return one, or a dataclass, dict or tuple that has one"
            )
        return rows, self._remap.stamp()

    def _rows_of(self, part: Any, *, is_whole: bool = False) -> Any:
        """`part` of a batch with rows in the place of raw IDs, or itself if it has none of them."""
        if isinstance(part, KeyedJaggedTensor):
            needed = {feature for _, feature in self._remap.table_features}
            return self._remap(part) if needed.issubset(part.keys()) else part
        if isinstance(part, tuple | list):
            items = [self._rows_of(item) for item in part]
            if all(new is old for new, old in zip(items, part, strict=True)):
                return part
            return type(part)(*items) if hasattr(part, "_fields") else type(part)(items)
        if isinstance(part, dict):
            return self._with_rows(part, part, dict.__setitem__)
        if is_dataclass(part) and not isinstance(part, type):
            values = {field.name: getattr(part, field.name) for field in fields(part)}
        else:  # further objects may be anything
            values = getattr(part, "__dict__", {}) if is_whole else {}
        return self._with_rows(part, values, object.__setattr__)  # frozen or not

    def _with_rows(self, part: Any, values: Mapping[Any, Any], assign: Callable[[Any, Any, Any], None]) -> Any:
        changed = {key: new for key, old in values.items() if (new := self._rows_of(old)) is not old}
        twin = copy(part) if changed else part
        for key, new in changed.items():
            assign(twin, key, new)
        return twin

    def batches(self, loader: Iterable[tuple[Samples, torch.Tensor]]) -> Iterator[Samples]:
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
