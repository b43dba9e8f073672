"""The IDs of a stream that weigh most, in buckets of a few slots, of which the lightest ID makes room for a new one."""

import numpy as np
import numpy.typing as npt

from torchrec_cce.jit import jit

NO_ID = -1
NO_ROW = -1


@jit
def add_weights(
    ids: npt.NDArray[np.int64],
    buckets: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float32],
    known: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int32],
) -> None:
    """Add weights to the scores of IDs, in their order.

    An ID that its bucket does not know takes a free slot, or else that of the lowest score, which it takes over and
    adds its weight to, as in SpaceSaving (Metwally et al. 2005). The row that the slot had is then nobody's.

    Args:
        ids, buckets, weights: [N], none of them negative.
        known: [b, s], the IDs in the slots of each bucket, `NO_ID` for none; changed, like the two below.
        scores: [b, s].
        rows: [b, s], what belongs to the ID of each slot, `NO_ROW` for nothing.
    """
    for i in range(len(ids)):
        bucket = buckets[i]
        slot = lowest = 0
        found = False
        for s in range(known.shape[1]):
            if known[bucket, s] == ids[i]:
                slot, found = s, True
                break
            if scores[bucket, s] < scores[bucket, lowest]:
                lowest = s
        if not found:
            slot = lowest
            known[bucket, slot] = ids[i]
            rows[bucket, slot] = NO_ROW
        scores[bucket, slot] += weights[i]
