"""`HelperUse`: whether the tables of a checkpoint use their helper."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HelperUse:
    """Whether tables use their helper: the configuration of a run says so, else the caller or the optimizer's state."""

    of_run: bool | None = None
    """What the run's configuration says of all its tables; None for a checkpoint that lies by itself."""
    of_tables: Mapping[str, bool] = field(default_factory=dict)
    """Table → what the caller says of it; only for a checkpoint that lies by itself."""

    def of(self, table: str, states: Callable[[], Iterable[npt.NDArray[np.float32]]]) -> bool:
        """Whether one table uses its helper.

        Training changes the state of each row that a batch reads in its own way, and a clustering sets the states of
        all helper rows to zero. A helper whose rows have different states is therefore in use. If all states are
        equal, either the helper is unused or nothing was trained since the model was made or clustered. The weights
        do not tell these apart, because an unused helper may be zero or hold the random values that it was drawn as.

        Args:
            states: the optimizer's states of the helper's rows, each [c, k, …].

        Raises:
            ConfigError: the caller says nothing of the table and its states do not tell, or the two contradict.
        """
        if self.of_run is not None:
            return self.of_run
        said = self.of_tables.get(table)
        is_trained = any(np.any(state != state[:1, :1]) for state in states())
        if said is None and not is_trained:
            raise ConfigError(
                f"table {table!r}: the optimizer's state is the same in all rows of its helper, or there is none: it "
                "has use_helper=False, or was not trained since it was made or clustered; say which, by "
                f"`use_helper` of {table!r}"
            )
        if is_trained and said is False:
            raise ConfigError(
                f"table {table!r}: the optimizer's state says that its helper was trained; leave the "
                "table out of `use_helper`"
            )
        return is_trained if said is None else said
