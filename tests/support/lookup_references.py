"""The lookup's loops in plain numpy, on codes instead of words and on float64."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from torchrec_cce.kernels.lookup.layout import FeatureTable


def addresses(arrays: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.uint64]:
    """[tables] uint64: where the numbers of each array begin, which must be C-contiguous and outlive their use."""
    return np.array([array.ctypes.data for array in arrays], np.uint64)


def reference_words(codes: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.uint64]:
    """`codes: [t, c, N]` of so many bits as words, [t · ⌈c·bits/64⌉, N]."""
    per_word = 64 // bits
    num_terms, num_columns, count = codes.shape
    words = np.zeros((num_terms, -(-num_columns // per_word), count), np.uint64)
    for column in range(num_columns):
        shift = np.uint64(column % per_word * bits)
        words[:, column // per_word] |= codes[:, column].astype(np.uint64) << shift
    return words.reshape(num_terms * words.shape[1], count)


def reference_pooled(
    features: Sequence[FeatureTable],
    tables: Sequence[npt.NDArray[np.float32]],
    codes: Sequence[npt.NDArray[np.int64]],
    lengths: Sequence[npt.NDArray[np.int64]],
    weights: Sequence[npt.NDArray[np.float32]],
) -> npt.NDArray[np.float64]:
    """[B, Σ d] of features whose IDs have `codes: [t, c, N]` and `weights: [N]`, in bags of `lengths: [B]`."""
    parts = []
    for feature, code, length, weight in zip(features, codes, lengths, weights, strict=True):
        table, bags = tables[feature.table].astype(np.float64), np.repeat(np.arange(len(length)), length)
        divisor = np.maximum(length, 1) if feature.is_mean else np.ones_like(length)
        for column in range(feature.num_columns):
            pooled = np.zeros((len(length), feature.width))
            for term in range(feature.num_terms):
                rows = column * feature.column_rows + term * feature.term_rows + code[term, column]
                np.add.at(pooled, bags, table[rows] * weight[:, None])
            parts.append(pooled / divisor[:, None])
    return np.concatenate(parts, axis=1)


def reference_gradients(
    features: Sequence[FeatureTable],
    tables: Sequence[npt.NDArray[np.float32]],
    codes: Sequence[npt.NDArray[np.int64]],
    lengths: Sequence[npt.NDArray[np.int64]],
    weights: Sequence[npt.NDArray[np.float32]],
    out: npt.NDArray[np.float32],
) -> list[npt.NDArray[np.float64]]:
    """What the gradient `out: [B, Σ d]` gives to each table."""
    found = [np.zeros(table.shape) for table in tables]
    at = 0
    for feature, code, length, weight in zip(features, codes, lengths, weights, strict=True):
        bags = np.repeat(np.arange(len(length)), length)
        divisor = np.maximum(length, 1) if feature.is_mean else np.ones_like(length)
        for column in range(feature.num_columns):
            part = out[:, at : at + feature.width].astype(np.float64) / divisor[:, None]
            at += feature.width
            for term in range(feature.num_terms):
                rows = column * feature.column_rows + term * feature.term_rows + code[term, column]
                np.add.at(found[feature.table], rows, part[bags] * weight[:, None])
    return found
