"""A run that starts from the model of another run: pointers learned from its embeddings, and its other weights.

Product, residual and row-wise quantization after training, and what the paper tried around them (Appendix A): more
parameters before the clustering than after, several helpers, circular clustering, seeding with PQ.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchrec import EmbeddingBagConfig
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_cce.clustering.entropy import pointer_entropies
from torchrec_cce.clustering.executor import named_errors
from torchrec_cce.clustering.quantize import Quantized, quantize
from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig
from torchrec_cce.methods.sketch import Sketch
from torchrec_cce.modules.compressed_bag import CompressedEmbeddingBag
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection
from torchrec_cce.modules.snapshots import snapshot_of
from torchrec_cce.modules.state_names import computed_prefix, in_checkpoint, joined
from torchrec_cce.sharding.distributed_checkpoint import DistributedCheckpoint
from torchrec_cce.sharding.tables import collections_of
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.config_file import read_run_config
from torchrec_cce.training.input import num_dense
from torchrec_cce.training.model import build_model
from torchrec_cce.training.rowwise import rowwise_quantized

_CPU = torch.device("cpu")
_IDS_AT_A_TIME = 65536


def derived_model(config: RunConfig) -> nn.Module:
    """The model that `config` starts from, whole and on the CPU; the same on every rank that calls this.

    Raises:
        ConfigError: there is no such run or it has no checkpoint, its tables have other sizes, or the method of a table
            here has no learned pointers.
        ClusteringError: its embeddings are NaN or infinite.
    """
    section = config.derive
    assert section is not None
    source_config = read_run_config(Path(section.run))
    _check(config, source_config, section.run)
    source = _load(Path(section.run), source_config)
    model = build_model(config, num_dense=num_dense(config), device=_CPU)
    ((path, collection),) = _collections(model)
    ((_, source_collection),) = _collections(source)
    source_tables = {table.name: table for table in source_collection.embedding_bag_configs()}
    learned = [table for table in collection.embedding_bag_configs() if type(table) is not EmbeddingBagConfig]
    if section.dense:
        _take_over(model, source, but=learned, collection=collection, path=path)
    snapshots = {}
    for table in learned:
        found = _learn(table, embeddings(source_collection, source_tables[table.name]), config)
        if isinstance(table, CCEConfig):
            snapshots[table.name] = _clustered(collection.pointer_map(table.name), table, found)
        else:
            assert collection.computed is not None
            sketch = collection.computed.tables[table.name]
            assert isinstance(sketch, Sketch)
            sketch.store(found.pointers, found.codewords)
    collection.restore(snapshots)
    if section.bits is not None:
        with torch.no_grad():
            for table in collection.embedding_bag_configs():
                weight = collection.get_parameter(collection.weight_name(table.name))
                weight.copy_(rowwise_quantized(weight, section.bits))
    return model


def start_from(model: DistributedModelParallel, whole: nn.Module) -> dict[str, tuple[float, ...]]:
    """Give the sharded `model` the maps and weights of `whole`, which is the same on every rank.

    Returns:
        CCE table → `H1 … Hc` of its pointers.
    """
    entropies = {}
    for path, collection in collections_of(model).items():
        other = whole.get_submodule(path)
        assert isinstance(other, CCEEmbeddingBagCollection)
        for table in collection.cce_tables():
            pointer_map = other.pointer_map(table)
            collection.attach_pointer_map(table, pointer_map)
            if pointer_map.stored is not None:
                entropies[table] = pointer_entropies(pointer_map.learned_codes, pointer_map.num_rows)
    model.load_state_dict(whole.state_dict())
    return entropies


def embeddings(collection: CCEEmbeddingBagCollection, table: EmbeddingBagConfig) -> npt.NDArray[np.float32]:
    """`[n, d] float32`: the embedding of every raw ID of a table of any method."""
    bag = CompressedEmbeddingBag(table)
    inner = bag.collection
    if isinstance(table, CCEConfig):
        inner.attach_pointer_map(table.name, collection.pointer_map(table.name))
    state = collection.state_dict()
    names = [name for name, _ in (*inner.named_parameters(), *inner.named_buffers())]
    inner.load_state_dict({name: state[name] for name in names}, strict=False)  # all but the attached map
    with torch.no_grad():
        parts = [bag(ids[:, None]) for ids in torch.arange(table.num_embeddings).split(_IDS_AT_A_TIME)]
    whole: npt.NDArray[np.float32] = torch.cat(parts).numpy()
    return whole


def _check(config: RunConfig, source: RunConfig, run: str) -> None:
    mine, theirs = (
        {
            table.name: (table.num_embeddings, table.embedding_dim, table.feature_names)
            for table in run_config.full_tables()
        }
        for run_config in (config, source)
    )
    differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if differing:
        raise ConfigError(
            f"derive.run={run!r} has other tables: {', '.join(differing)} differ in num_embeddings, dim or features; "
            "derive from a run with the same [tables] and embedding.dim"
        )


def _load(run_dir: Path, config: RunConfig) -> nn.Module:
    """The model of a run's newest checkpoint, in this process, whatever ranks wrote it."""
    model = build_model(config, num_dense=num_dense(config), device=_CPU)
    folder = checkpoint.newest_whole(run_dir)
    for path, collection in _collections(model):
        collection.restore(checkpoint.read_maps(folder, path))
    weights = model.state_dict()
    DistributedCheckpoint(folder=folder).fill({in_checkpoint(name): value for name, value in weights.items()})
    model.load_state_dict(weights)
    return model


def _collections(model: nn.Module) -> Iterator[tuple[str, CCEEmbeddingBagCollection]]:
    for path, module in model.named_modules():
        if isinstance(module, CCEEmbeddingBagCollection):
            yield path, module


def _take_over(
    model: nn.Module,
    source: nn.Module,
    *,
    but: list[EmbeddingBagConfig],
    collection: CCEEmbeddingBagCollection,
    path: str,
) -> None:
    """Copy all weights except those of the tables `but`, of the `collection` at `path`."""
    left_out = tuple(joined(path, name) for table in but for name in _parameters_of(table, collection))
    theirs = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(left_out):
                parameter.copy_(theirs[name])


def _parameters_of(table: EmbeddingBagConfig, collection: CCEEmbeddingBagCollection) -> list[str]:
    """What the names of a table's parameters start with, within its collection."""
    if isinstance(table, ComputedEmbeddingBagConfig):
        return [computed_prefix(table.name)]
    has_rows = isinstance(table, CCEConfig) and table.has_stock_residents
    rows = [collection.residents_name(table)] if has_rows else []
    return [collection.weight_name(table.name), *rows]


def _learn(table: EmbeddingBagConfig, points: npt.NDArray[np.float32], config: RunConfig) -> Quantized:
    """Pointers and codewords for `table` that come near `points: [n, d]`."""
    assert config.derive is not None
    stored = 1 if isinstance(table, CCEConfig) else getattr(table, "num_stored_terms", 0)
    if stored == 0:
        raise ConfigError(
            f"table {table.name!r}: method={config.embedding.method!r} has no learned pointers that another run could "
            "give it; derive is for cce, cce_helpers, pq, rq and rq_hash_embeddings"
        )
    with named_errors(table.name):
        return quantize(
            points,
            num_columns=table.num_columns,
            num_terms=stored,
            num_rows=table.num_rows,
            seed=derive_seed(config.seed, table.name, "derive"),
            settings=config.recluster.settings(),
            circular=config.derive.circular,
        )


def _clustered(start: PointerMap, table: CCEConfig, found: Quantized) -> TableSnapshot:
    """The table as after a clustering: learned codewords in the codebook, and a helper of zeros with a fresh hash."""
    codebook = found.codewords[:, 0]
    weights = np.stack([codebook, np.zeros_like(codebook)], axis=1)  # [c, 2, k, d/c]
    pointers = table.pointer_format.encode(found.pointers[:, :, 0])
    helper_hash = start.next_helper_hash(derive_seed(table.seed, table.name, "derive"))
    return snapshot_of(
        table, start.clustered(pointers, helper_hash), weights=weights.reshape(table.num_physical_rows, -1)
    )
