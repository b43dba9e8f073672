"""What the parts of a collection are called in state dicts and in checkpoints. No other file spells these names.

A checkpoint is `{"model": model.state_dict(), "optimizer": optimizer.state_dict()}`. The key of a tensor in it joins
the keys on the way to the tensor by dots. None of this needs a model, so that offline readers of checkpoints use it.
"""

import re

CODEWORDS = "codewords"
"""The stock collection, within ours, of the codewords of tables with residents."""
RESIDENTS = "residents"
"""The stock collection, within ours, of the rows of residents."""
COMPUTED = "computed."
"""What the names of all parameters of computed tables start with, within their collection."""
STAMPS = "remap._extra_state"
"""The stamps of the maps of a collection, within it."""
_STAMPS_IN_CHECKPOINT = re.compile(rf"model\.(?:(?P<collection>.+)\.)?{re.escape(STAMPS)}")


def bag_weight(stock: str, table: str) -> str:
    """The weights of a table of the stock `EmbeddingBagCollection` at the path `stock`."""
    return f"{stock}.embedding_bags.{table}.weight"


def embedding_weight(stock: str, table: str) -> str:
    """The weights of a table of the stock `EmbeddingCollection` at the path `stock`."""
    return f"{stock}.embeddings.{table}.weight"


def pooled_weight(table: str) -> str:
    """The weights of a table, within its `CCEEmbeddingBagCollection`."""
    return bag_weight("ebc", table)


def codewords_weight(table: str) -> str:
    """The codewords of a table with residents, within its `CCEEmbeddingBagCollection`."""
    return bag_weight(CODEWORDS, table)


def residents_weight(table: str) -> str:
    """The rows of the residents of a table, within its `CCEEmbeddingBagCollection`.

    Args:
        table: that of the rows, see `CCEConfig.resident_table`.
    """
    return bag_weight(RESIDENTS, table)


def quantized_rows(table: str) -> str:
    """The module with the float16 or int8 rows of the residents of a table, within its collection.

    Args:
        table: that of the rows, see `CCEConfig.resident_table`.
    """
    return f"quantized_residents.tables.{table}"


def part_of(stock: str) -> str:
    """What the stock collection at the path `stock` is in ours: `"ebc"`, `"ecs"`, `CODEWORDS` or `RESIDENTS`."""
    *_, part = (name for name in stock.split(".") if not name.isdigit())  # those of sequences end in their width
    return part


def sequence_weight(table: str, width: int) -> str:
    """The weights of a table whose rows have `width` values, within its `CCEEmbeddingCollection`."""
    return embedding_weight(f"ecs.{width}", table)


def sequence_codewords_weight(table: str, width: int) -> str:
    """The same of a table with residents."""
    return embedding_weight(f"{CODEWORDS}.{width}", table)


def sequence_residents_weight(table: str) -> str:
    """The rows of the residents of a table, within its `CCEEmbeddingCollection`.

    Args:
        table: that of the rows, see `CCEConfig.resident_table`.
    """
    return embedding_weight(RESIDENTS, table)


def split_weight(name: str) -> tuple[str, str]:
    """The path of the stock collection that has these weights, and the table that they are of."""
    stock, _, table, _ = name.rsplit(".", 3)
    return stock, table


def stock_name(weight: str) -> str:
    """The weights of a table of TorchRec's own collection, within it, where ours calls them `weight`.

    `ebc.embedding_bags.t.weight` is `embedding_bags.t.weight`, and `ecs.16.embeddings.t.weight` `embeddings.t.weight`.
    """
    return ".".join(weight.split(".")[-3:])


def computed_prefix(table: str) -> str:
    """What the names of a computed table's parameters start with, within their collection."""
    return f"{COMPUTED}tables.{table}."


def joined(path: str, name: str) -> str:
    """`name` within the module at `path`, which is empty for the model itself."""
    return f"{path}.{name}" if path else name


def in_checkpoint(name: str) -> str:
    """An entry of the model's state dict, as a checkpoint calls it."""
    return f"model.{name}"


def optimizer_state(weight: str, entry: str) -> str:
    """An entry of the optimizer's state of the parameter `weight`, as a checkpoint calls it."""
    return f"optimizer.state.{weight}.{entry}"


def stamps_of(collection: str) -> str:
    """The stamps of the maps of the collection at this path, as a checkpoint calls them."""
    return in_checkpoint(joined(collection, STAMPS))


def stamped_collection(key: str) -> str | None:
    """The path of the collection whose stamps a checkpoint calls `key`; None if `key` is something else."""
    match = _STAMPS_IN_CHECKPOINT.fullmatch(key)
    return None if match is None else match["collection"] or ""
