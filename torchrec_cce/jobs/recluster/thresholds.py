"""What the gates before publishing ask for. It is apart from `gates` so that a command's `--help` needs no scipy."""

import math
from dataclasses import dataclass, fields

from torchrec_cce.clustering.settings import MIN_H1, MIN_H2_GAIN, MIN_LEARNED
from torchrec_cce.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """How good a clustering must be. A figure that equals its limit passes."""

    min_h1: float = MIN_H1
    """Smallest H1 as a share of log k, or of log n where n is smaller. Below: few rows have most of the IDs."""
    min_h2_gain: float = MIN_H2_GAIN
    """Smallest H2 − H1 as a share of what it is for random pointers, or of what n IDs leave room for. Below: one column
    follows from another."""
    min_learned: float = MIN_LEARNED
    """How far H1 or H2 must lie below that of random pointers, as a share of it. Below: as random as a hash."""
    max_error: float = 0.8
    """Largest mean squared distance to the new codewords as a share of the variance of the embeddings. 1: no better
    than one codeword for all IDs."""
    max_objective_ratio: float = 1.05
    """Largest mean squared distance to the new codewords over that to the means of the parent's clusters."""
    max_churn: float = 0.8
    """Largest share of the pointers that change."""
    max_unseen: float = 0.9
    """Largest share of the IDs that were never seen, where they were counted."""
    max_bce_ratio: float = 1.02
    """Largest validation BCE after the clustering over the one before."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{field.name}={value} is not a number from 0 up")
