"""Pooled embeddings of bags, and their gradients, by the codes of IDs, on a GPU: kernels in the language of Triton.

They read the words and lines of `kernels.lookup.layout`, as the loops of the CPU do. Only where tables are on a GPU is
this file imported, because it needs Triton. A program does a block of bags; blocks of the same columns come one after
another, so that codewords stay in a cache.
"""

from collections.abc import Callable
from typing import Any, cast

import triton
import triton.language as tl

from torchrec_cce.kernels.lookup import layout

TABLE, SOURCE, WORD, WORDS_A_TERM = (
    tl.constexpr(field) for field in (layout.TABLE, layout.SOURCE, layout.WORD, layout.WORDS_A_TERM)
)
SHIFT, MASK, ROW_BYTES, TERM_BYTES = (
    tl.constexpr(field) for field in (layout.SHIFT, layout.MASK, layout.ROW_BYTES, layout.TERM_BYTES)
)
START_BYTES, OUT_BYTES, IS_MEAN, NUM_FIELDS = (
    tl.constexpr(field) for field in (layout.START_BYTES, layout.OUT_BYTES, layout.IS_MEAN, layout.NUM_FIELDS)
)
FLOAT_BYTES = tl.constexpr(4)
FEW = tl.constexpr(4)
"""Rows are gathered before they are added where a block has so many times as many IDs as distinct rows."""

# Sizes of batches differ, for which nothing is to be compiled anew.
_kernel = cast(
    Callable[[Callable[..., Any]], Any], triton.jit(do_not_specialize=["num_bags", "num_values", "first_line"])
)
_function = cast(Callable[[Callable[..., Any]], Any], triton.jit)


@_function
def _share(is_mean, lengths):  # type: ignore[no-untyped-def]
    """By what the sums of bags of so many IDs are multiplied."""
    return tl.where((is_mean != 0) & (lengths > 0), 1.0 / tl.maximum(lengths, 1).to(tl.float32), 1.0)


@_kernel
def pool_bags(  # type: ignore[no-untyped-def]
    columns,
    tiles,
    tables,
    words,
    offsets,
    weights,
    out,
    num_bags,
    num_values,
    dim,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
    LANES: tl.constexpr,
    BAGS: tl.constexpr,
):
    """Write the pooled embeddings of `BAGS` bags in the columns of one tile.

    Args:
        columns: [lines, fields] int64, see `Layout`; tiles: [tiles, 2] int64, see `Tiles`.
        tables: [tables] int64, the address of each, float32.
        words: [W, num_values] int64.
        offsets: [sources · num_bags + 1] int64: where in `num_values` each bag of each source begins.
        weights: [num_values] float32, or None where all are 1.
        out: [num_bags, dim] float32, written to.
    """
    num_blocks = tl.cdiv(num_bags, BAGS)
    tile, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    first = tl.load(tiles + 2 * tile)
    lanes = tl.arange(0, LANES)
    inside = lanes < (tl.load(tiles + 2 * tile + 1) - first) * WIDTH
    one, line = columns + first * NUM_FIELDS, columns + (first + lanes // WIDTH) * NUM_FIELDS
    shift = tl.load(line + SHIFT, mask=inside, other=0)[None, :]
    mask = tl.load(line + MASK, mask=inside, other=0)[None, :]
    row_bytes = tl.load(line + ROW_BYTES, mask=inside, other=0)[None, :]
    term_bytes = tl.load(line + TERM_BYTES, mask=inside, other=0)[None, :]
    word = tl.load(line + WORD, mask=inside, other=0)[None, :]
    next_word = tl.load(line + WORDS_A_TERM, mask=inside, other=0)[None, :]
    float_of_row = lanes % WIDTH
    start = tl.load(tables + tl.load(one + TABLE)) + tl.load(line + START_BYTES, mask=inside, other=0)
    start = (start + float_of_row * FLOAT_BYTES)[None, :]

    bags = block.to(tl.int64) * BAGS + tl.arange(0, BAGS)
    live = bags < num_bags
    bounds = offsets + tl.load(one + SOURCE) * num_bags + bags
    begin, after = tl.load(bounds, mask=live, other=0), tl.load(bounds + 1, mask=live, other=0)
    total = tl.zeros([BAGS, LANES], tl.float32)
    for place in range(tl.max(after - begin, axis=0)):
        values = (begin + place)[:, None]
        used = (begin + place < after)[:, None] & inside[None, :]
        for term in tl.static_range(TERMS):
            packed = tl.load(words + (word + term * next_word) * num_values + values, mask=used, other=0)
            address = start + term * term_bytes + ((packed >> shift) & mask) * row_bytes
            row = tl.load(address.to(tl.pointer_type(tl.float32)), mask=used, other=0.0)
            if weights is None:
                total += row
            else:
                total += row * tl.load(weights + values, mask=used, other=0.0)
    total *= _share(tl.load(one + IS_MEAN), after - begin)[:, None]
    place = tl.load(line + OUT_BYTES, mask=inside, other=0) // FLOAT_BYTES + float_of_row
    tl.store(out + bags[:, None] * dim + place[None, :], total, mask=live[:, None] & inside[None, :])


@_kernel
def add_gradients(  # type: ignore[no-untyped-def]
    columns,
    tables,
    words,
    offsets,
    weights,
    gradients,
    num_bags,
    num_values,
    dim,
    first_line,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
    LANES: tl.constexpr,
    BAGS: tl.constexpr,
):
    """Add to gradients of tables what `BAGS` bags of `gradients: [num_bags, dim]` give in the columns of one line.

    Rows are added atomically, which needs no sort: a GPU does that in its second cache, as fast as it reads gradients,
    but one after another where all add to one row. That is so for features of few IDs or with one that most have, so
    that a block that has few distinct rows gathers them first, by a product of its own with the matrix that says which
    IDs have a row in common, and adds each once. Scanning the batch for each block of codewords would need no atomics,
    but read all of it `k / block` times; Triton cannot scatter to shared memory. The order of atomic sums, and with it
    their last bits, differs from run to run.

    Args:
        tables: [tables] int64, the address of the gradient of each, float32; 0 where none is wanted.
        LANES, BAGS: at least 16.

    All others are as of `pool_bags`.
    """
    num_blocks = tl.cdiv(num_bags, BAGS)
    line = columns + (first_line + tl.program_id(0) // num_blocks) * NUM_FIELDS
    table = tl.load(tables + tl.load(line + TABLE))
    shift, mask = tl.load(line + SHIFT), tl.load(line + MASK)
    row_bytes, term_bytes = tl.load(line + ROW_BYTES), tl.load(line + TERM_BYTES)
    word, next_word = tl.load(line + WORD), tl.load(line + WORDS_A_TERM)
    lanes, places = tl.arange(0, LANES), tl.arange(0, BAGS)
    inside = (lanes < WIDTH)[None, :]
    start = (table + tl.load(line + START_BYTES) + lanes * FLOAT_BYTES)[None, :]

    bags = (tl.program_id(0) % num_blocks).to(tl.int64) * BAGS + places
    live = (bags < num_bags) & (table != 0)
    bounds = offsets + tl.load(line + SOURCE) * num_bags + bags
    begin, after = tl.load(bounds, mask=live, other=0), tl.load(bounds + 1, mask=live, other=0)
    source = gradients + bags[:, None] * dim + (tl.load(line + OUT_BYTES) // FLOAT_BYTES + lanes)[None, :]
    gradient = tl.load(source, mask=live[:, None] & inside, other=0.0)
    gradient *= _share(tl.load(line + IS_MEAN), after - begin)[:, None]
    for place in range(tl.max(after - begin, axis=0)):
        values = begin + place
        used = values < after
        part = tl.where(used[:, None], gradient, 0.0)
        if weights is not None:
            part *= tl.load(weights + values, mask=used, other=0.0)[:, None]
        for term in tl.static_range(TERMS):
            packed = tl.load(words + (word + term * next_word) * num_values + values, mask=used, other=0)
            code = (packed >> shift) & mask
            address = (start + term * term_bytes + (code * row_bytes)[:, None]).to(tl.pointer_type(tl.float32))
            same = (code[:, None] == code[None, :]) & used[None, :]
            earlier = same & (places[None, :] < places[:, None])
            leads = used & (tl.max(earlier.to(tl.int32), axis=1) == 0)
            if tl.sum(leads.to(tl.int32)) * FEW <= tl.sum(used.to(tl.int32)):
                gathered = tl.dot(same.to(tl.float32), part, input_precision="ieee")
                tl.atomic_add(address, gathered, mask=leads[:, None] & inside, sem="relaxed")
            else:
                tl.atomic_add(address, part, mask=used[:, None] & inside, sem="relaxed")
