"""`Copies`: collections that were copied of one another, so that an average of weights over two maps is noticed."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import nn

from torchrec_cce.errors import MapMismatchError
from torchrec_cce.maps.pointer_map import PointerMap

_SAMPLE = 1024
"""Of a table's numbers, by which it is known whether they were averaged: an average changes them all."""


class Copyable(Protocol):
    """A collection, as its copies see it."""

    outdated: dict[str, "Outdated"]

    def pointer_map(self, table: str) -> PointerMap: ...


class Copies:
    """A collection and what was made of it by `copy.deepcopy`, as `torch.optim.swa_utils.AveragedModel` does.

    What is copied along with each of them is this very object. A pickle knows of no other collections.
    """

    def __init__(self) -> None:
        self._members: WeakSet[Any] = WeakSet()

    def add(self, collection: Copyable) -> None:
        self._members.add(collection)

    def got_another_map(self, collection: Copyable, table: str, weight_of: Callable[[Any], nn.Parameter]) -> None:
        """`collection` has another map of `table`. Copies that have not are outdated from now on.

        Args:
            weight_of: the weights of the table in a collection. Raises ValueError where they are sharded.
        """
        collection.outdated.pop(table, None)
        own = collection.pointer_map(table)
        for copy in self._others(collection):
            if copy.pointer_map(table).digest == own.digest:
                copy.outdated.pop(table, None)
            elif table not in copy.outdated:
                try:
                    copy.outdated[table] = Outdated(weight_of(copy), own.identity)
                except ValueError:
                    continue

    def _others(self, collection: Copyable) -> Iterator[Any]:
        return (copy for copy in list(self._members) if copy is not collection)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Copies":
        return self

    def __reduce__(self) -> tuple[type["Copies"], tuple[()]]:
        return Copies, ()


class Outdated:
    """The weights of a table of a copy, from the moment when another collection got another map.

    They stay what they are, or are trained as they were, by gradients of their own. If they change without, they are
    an average with weights of the other map.
    """

    def __init__(self, weight: nn.Parameter, other: str) -> None:
        self._weight, self._other, self._then = weight, other, _sample(weight)
        self._is_trained = weight.grad is not None
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(self._note_gradient)

    def _note_gradient(self, _weight: torch.Tensor) -> None:
        self._is_trained = True

    def check(self, table: str, own: str) -> None:
        """Raise MapMismatchError if the weights were averaged with others."""
        if not self._is_trained and not torch.equal(_sample(self._weight), self._then):
            raise MapMismatchError(
                f"table {table!r}: the weights of this copy, whose map is {own}, were changed after what it is a copy "
                f"of got the map {self._other}; an average over both means nothing. Make a new copy (AveragedModel, "
                "EMA) after each clustering"
            )


def _sample(weight: torch.Tensor) -> torch.Tensor:
    numbers = weight.detach().flatten()
    return numbers[:: max(1, len(numbers) // _SAMPLE)].clone()
