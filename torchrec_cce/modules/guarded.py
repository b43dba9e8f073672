"""`Guarded`: what keeps the weights of a collection and its maps together, whatever is done to either."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.modules.copies import Copies, Outdated
from torchrec_cce.modules.lost_maps import warn_if_lost
from torchrec_cce.modules.map_stamp import check_stamped
from torchrec_cce.modules.remap import Remap
from torchrec_cce.modules.state_names import STAMPS, joined
from torchrec_cce.modules.surroundings import Surroundings


class Guarded(ABC, nn.Module):
    """A collection that refuses weights of other maps than its own: loaded, loaded in place, or averaged with others'.

    A subclass adds `remap` first and its trained tables after: `load_state_dict` then compares maps before it
    overwrites a weight.
    """

    remap: Remap
    _own_remap: tuple[Remap]
    """Still itself where a training pipeline has put a wrapper in its place. In a tuple it is no second submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.outdated: dict[str, Outdated] = {}
        """Table → what its weights were when a copy got another map."""
        self._surroundings = Surroundings()
        self._has_warned = False
        self._copies = Copies()
        self._copies.add(self)

    @abstractmethod
    def weight_name(self, table: str) -> str:
        """The name of a table's weights in `state_dict`, sharded or not."""

    @abstractmethod
    def pointer_map(self, table: str) -> PointerMap:
        """The map of a table."""

    @abstractmethod
    def _parameter(self, name: str) -> nn.Parameter:
        """The weights of this name, unless they are sharded: then ConfigError."""

    def check_weights(self) -> None:
        """Raise MapMismatchError if weights are not those of the attached maps: after a load in place, or an average
        with a model that was clustered meanwhile."""
        self._own_remap[0].check_weights()
        self._check_copies()

    def _check_copies(self) -> None:
        for table, outdated in self.outdated.items():
            outdated.check(table, self._own_remap[0].pointer_map(table).identity)

    def _got_another_map(self, table: str) -> None:
        self._copies.got_another_map(self, table, lambda other: other._parameter(other.weight_name(table)))

    def _before_forward(self, features: KeyedJaggedTensor) -> None:
        """What `forward` begins with; the remap, or what takes its place, then calls `Remap.check_weights`."""
        self._check_copies()
        self._surroundings.look(self, features, is_ahead=not isinstance(self.remap, Remap))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._copies.add(self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._check_copies()
        if not self._has_warned:
            own = self._own_remap[0]
            self._has_warned = warn_if_lost(own.pointer_map(table) for table in own.cce_tables())
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Refuse weights that come without the stamp of a map, before those are loaded whose stamp fits."""
        tables = self._own_remap[0].cce_tables()
        loaded = [table for table in tables if prefix + self.weight_name(table) in state_dict]
        check_stamped(state_dict.get(joined(prefix.removesuffix("."), STAMPS)), tables, loaded)
        for table in loaded:
            self.outdated.pop(table, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
