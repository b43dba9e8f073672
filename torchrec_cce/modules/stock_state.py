"""State dicts of models with TorchRec's own collections in place of ours: taken over and written, for full tables."""

from typing import Any, Protocol, runtime_checkable

from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.table import CompressedConfig
from torchrec_cce.modules.map_stamp import MapStamp
from torchrec_cce.modules.state_names import STAMPS, joined, stock_name


@runtime_checkable
class StockTables(Protocol):
    """What is asked of a collection."""

    def configs(self) -> list[BaseEmbeddingConfig]: ...

    def cce_tables(self) -> list[str]: ...

    def weight_name(self, table: str) -> str: ...


def take_stock_tables(collection: StockTables, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Give the full tables that TorchRec's own collection saved under `prefix` the names they have in `collection`.

    A hook of `load_state_dict`, before a weight of the collection is overwritten.

    Raises:
        ConfigError: `state` has a full table where `collection` has a compressed one.
    """
    stock = {table.name: prefix + stock_name(collection.weight_name(table.name)) for table in collection.configs()}
    found = [table for table in collection.configs() if stock[table.name] in state]
    for table in found:
        if isinstance(table, CompressedConfig):
            raise ConfigError(
                f"table {table.name!r} is compressed ({type(table).__name__}); {stock[table.name]!r} is a full one, "
                f'{list(state[stock[table.name]].shape)}. Let a run with method = "full" have those weights '
                "and derive pointers and codewords from it ([derive], see docs/methods.md); or take that key out and "
                "load the others with strict=False"
            )
    for table in found:
        state[prefix + collection.weight_name(table.name)] = state.pop(stock[table.name])
    if found and not collection.cce_tables():
        state.setdefault(prefix + STAMPS, MapStamp.to_tensor([]))


def stock_state_dict(model: nn.Module) -> dict[str, Any]:
    """`model.state_dict()` as of a model with TorchRec's own collections in the place of ours; the same tensors.

    A stock model loads it, sharded or not, and so does `load_state_dict` of the model it came from. It is also what
    `torch.distributed.checkpoint.load` fills from the checkpoint of a stock model.

    Args:
        model: of `DistributedModelParallel`, its `module`.

    Raises:
        ConfigError: a table is not full.
    """
    state: dict[str, Any] = model.state_dict()
    for path, collection in model.named_modules():
        if not isinstance(collection, StockTables):
            continue
        for table in collection.configs():
            if isinstance(table, CompressedConfig):
                raise ConfigError(
                    f"table {table.name!r} is compressed ({type(table).__name__}): no full table is in the state dict. "
                    "Publish its map and codewords (Registry.publish), or keep the model's own state_dict"
                )
            weight = collection.weight_name(table.name)
            state[joined(path, stock_name(weight))] = state.pop(joined(path, weight))
        del state[joined(path, STAMPS)]
    return state
