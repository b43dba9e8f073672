"""Lemma B.4 and Figure 7: a ratio of independent positive variables whose expectation is at least one."""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.integrate import quad
from scipy.stats import beta

from torchrec_cce.errors import ConfigError

Distribution = Literal["exponential", "chi square"]
_SHARES = {"exponential": beta(1, 1), "chi square": beta(0.5, 0.5)}
"""How x / (x + y) is distributed."""


def expected_ratio(p: float, distribution: Distribution) -> float:
    """`E[x / (px + (1 − p)y)]`, x and y independent, by numerical integration to about 1e-6; Figure 7.

    The lemma says that it is at least 1 for `0 ≤ p ≤ 1/2`. At p = 0 it is infinite for both distributions.

    Raises:
        ConfigError: `p` is not in (0, 1], or the distribution is unknown.
    """
    if distribution not in get_args(Distribution):
        raise ConfigError(f"distribution={distribution!r} is not one of {', '.join(get_args(Distribution))}")
    if not 0 < p <= 1:
        raise ConfigError(f"p={p} is not in (0, 1]")
    quantile = _SHARES[distribution].ppf

    def ratio(u: float) -> float:
        share = quantile(u)
        return float(share / (p * share + (1 - p) * (1 - share)))

    value, _ = quad(ratio, 0, 1, limit=200)
    return float(value)


def mean_ratio(weights: npt.NDArray[np.float64], draws: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`a_n / Σ p_i a_i` of each row of `draws: [N, n]`, positive, with `weights: [n]` p, which sum to 1: [N].

    Lemma B.4: where the rows hold independent draws of one distribution and `p_n ≤ 1/n`, its mean is at least 1.
    """
    ratios: npt.NDArray[np.float64] = draws[:, -1] / (draws @ weights)
    return ratios
