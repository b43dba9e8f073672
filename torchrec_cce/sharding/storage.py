"""Host memory of index-pointer maps, which TorchRec's planner knows nothing of."""

import copy

from rich.filesize import decimal
from torch import nn
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType
from torchrec.distributed.types import ModuleSharder

from torchrec_cce.modules.collection import CCECollection


class MapStorageReservation(FixedPercentageStorageReservation):
    """Reserves host memory for the maps of a model, once a host: its ranks map the same files.

    Args:
        percentage: the share of device memory, 0 to 1, that is kept for everything but embedding tables.
    """

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        """`topology` with what is left for tables.

        Raises:
            PlannerError: the maps alone do not fit.
        """
        reserved = super().reserve(topology, batch_size, module, sharders, constraints)
        maps = map_bytes(module)
        share = -(-sum(maps.values()) // topology.local_world_size)
        for device in reserved.devices:
            device.storage.ddr -= share
            if device.storage.ddr < 0:
                largest = max(maps, key=lambda name: maps[name])
                raise PlannerError(
                    f"the index-pointer maps need {decimal(sum(maps.values()))} of each host's memory, which has "
                    f"{decimal((device.storage.ddr + share) * topology.local_world_size)}; the largest map, of "
                    f"{largest!r}, needs {decimal(maps[largest])}",
                    PlannerErrorType.INSUFFICIENT_STORAGE,
                )
        self._last_reserved_topology = copy.deepcopy(reserved)
        return reserved


def map_bytes(module: nn.Module) -> dict[str, int]:
    """Physical table, by path and name, → bytes of its map: `n·c` pointers, also before the first clustering makes
    them, and the vocabulary.
    """
    sizes = {}
    for path, collection in module.named_modules():
        if not isinstance(collection, CCECollection):
            continue
        for table in collection.cce_configs():
            vocabulary = collection.pointer_map(table.name).vocabulary
            pointers = table.num_embeddings * table.num_columns * table.pointer_dtype.itemsize
            holder = collection.weight_name(table.name).split(".")[:-3]  # of `<path>.embedding_bags.<table>.weight`
            name = ".".join([*filter(None, [path]), *holder, table.name])
            sizes[name] = pointers + (0 if vocabulary is None else vocabulary.nbytes)
    return sizes
