"""All methods: which there are, and full tables made into those of a method.

To add a method, declare it in `METHODS` of a file of this folder, and add its name to `Method` below. A new file also
goes into `_FILES`.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.pointer_format import MinPointerBits
from torchrec_cce.methods import cafe, cce, compositional, factored, quotient_remainder, rowless, sketch
from torchrec_cce.methods.residents import ResidentConfig
from torchrec_cce.methods.table import MethodSpec, Sizing

Method = Literal[
    "full",
    "hashing_trick",
    "ce_sum",
    "ce_concat",
    "ce_hybrid",
    "count_sketch",
    "cafe",
    "qr_sum",
    "qr_concat",
    "qr_product",
    "hash_embeddings",
    "dhe",
    "robe",
    "hashed_net",
    "tensor_train",
    "low_rank",
    "cce",
    "cce_residents",
    "cce_helpers",
    "pq",
    "rq",
    "rq_hash_embeddings",
]
"""The name of a method of compression, or `"full"`."""
METHODS: tuple[Method, ...] = get_args(Method)
"""All methods, `"full"` first."""

# The report's families stand in the order in which they are first declared here.
_FILES = (compositional, cafe, quotient_remainder, factored, rowless, sketch, cce)
SPECS: Mapping[str, MethodSpec] = {spec.name: spec for file in _FILES for spec in file.METHODS}
"""Every method but `"full"`."""
FAMILIES: Mapping[str, tuple[str, ...]] = {
    family: tuple(spec.name for spec in SPECS.values() if spec.family == family)
    for family in dict.fromkeys(spec.family for spec in SPECS.values())
}
"""Family → its methods."""


def tables_under_cap(
    tables: Sequence[EmbeddingBagConfig],
    *,
    method: Method,
    max_parameters: int,
    num_columns: int = 4,
    num_terms: int | None = None,
    use_helper: bool = True,
    residents: ResidentConfig | None = None,
    min_pointer_bits: MinPointerBits = 8,
    full_up_to: int = 0,
    seed: int = 0,
) -> list[EmbeddingBagConfig]:
    """Compress every table whose full size exceeds `max_parameters`; the others stay full tables.

    With `max_parameters=8000` and `embedding_dim=16`, a table of a million IDs gets 500 rows by the hashing trick or CE
    concat, and `k = 250` by CE hybrid or CCE, half of whose `2·k·d` parameters are in the second table.

    Args:
        tables: full tables; their names, features, pooling and data type are kept.
        method: how a large table is compressed; `"full"` leaves all as they are. Tables of `"pq"`, `"rq"`,
            `"rq_hash_embeddings"` and `"cce_helpers"` have random pointers until learned ones are given to them.
        max_parameters: how many trained parameters each table may have.
        num_columns: columns of the methods that have several; `"robe"`: blocks.
        num_terms: summed codewords of `"ce_sum"`, `"hash_embeddings"`, `"rq"`, `"rq_hash_embeddings"` (2 if not given)
            and, one of them the codebook's, of `"cce_helpers"` (3).
        use_helper: `"cce"`: False for codewords of the codebook alone, of as many rows.
        residents: `"cce_residents"`: how many IDs have a private row at a time; None: as many as usual.
        min_pointer_bits: of the methods that learn a map (`"cce"`, `"cce_residents"`, `"pq"`): 4 to store two pointers
            in a byte where tables have at most 16 rows.
        full_up_to: tables of at most so many IDs stay full, whatever `max_parameters` is.
        seed: of the hash functions.

    Raises:
        ConfigError: unknown method, or `max_parameters` below the smallest table that the method can make.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if method == "full":
        return list(tables)
    spec = SPECS[method]
    return [
        table
        if table.num_embeddings * table.embedding_dim <= max_parameters or table.num_embeddings <= full_up_to
        else spec.size(
            Sizing(
                table=table,
                method=method,
                max_parameters=max_parameters,
                num_columns=num_columns,
                num_terms=num_terms,
                use_helper=use_helper,
                residents=residents or ResidentConfig(),
                min_pointer_bits=min_pointer_bits,
                seed=seed,
            )
        )
        for table in tables
    ]
