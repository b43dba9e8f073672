"""Whether the tables of a checkpoint use their helper words: a run says so, a checkpoint by itself shows it at best."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HelperUse:
    """What is known before the tensors are read."""

    of_run: bool | None = None
    """Of all tables, by the configuration of a run; None for a checkpoint by itself."""
    of_tables: Mapping[str, bool] = field(default_factory=dict)
    """Table of a checkpoint by itself → what is said of it."""

    def of(self, table: str, states: Callable[[], Iterable[npt.NDArray[np.float32]]]) -> bool:
        """Of one table.

        Training changes the state of the rows that a batch reads, each in its own way, and a clustering makes that of
        all helper rows zero. So helper rows whose states differ are used. If all are alike, they are not used, or
        nothing was trained since the model was made or clustered: the weights do not tell, as a helper that is not used
        may be zero or what it was drawn as.

        Args:
            states: of the helper's rows, each [c, k, …].

        Raises:
            ConfigError: nothing is said of the table, and its states do not tell; or they tell another thing.
        """
        if self.of_run is not None:
            return self.of_run
        said = self.of_tables.get(table)
        is_trained = any(np.any(state != state[:1, :1]) for state in states())
        if said is None and not is_trained:
            raise ConfigError(
                f"table {table!r}: the optimizer's state is the same in all rows of its helper, or there is none: it "
                "has use_helper=False, or was not trained since it was made or clustered; say which, by "
                f"--without-helper {table} or --with-helper {table}"
            )
        if is_trained and said is False:
            raise ConfigError(
                f"table {table!r}: the optimizer's state says that its helper words were trained; leave "
                f"--without-helper {table} out"
            )
        return is_trained if said is None else said
