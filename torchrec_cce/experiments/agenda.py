"""What of a plan is still to be run, in which order, and what came of the rest."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from torchrec_cce.experiments.plan import MethodEntry, Plan, in_order_of_need
from torchrec_cce.experiments.results import TrialResult
from torchrec_cce.experiments.trial import Trial, drop_checkpoint, forget, result_before
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config import RunConfig, config_digest
from torchrec_cce.training.config_file import WrongValue


@dataclass(frozen=True, kw_only=True)
class SizedEntry:
    """An entry of the plan under one cap. It has one learning rate, which is chosen."""

    name: str
    """Of the entry."""
    max_parameters: int | None


@dataclass(frozen=True, kw_only=True)
class TrialID:
    """Says which trial of a plan is meant."""

    entry: SizedEntry
    learning_rate: float
    seed: int


class Agenda:
    """The trials of a plan, whose runs are folders of `runs`.

    The first seed of an entry under a cap tries each learning rate; the rate with the lowest validation BCE is chosen,
    and the other seeds run with it. A derived trial waits for the run that it starts from.
    """

    def __init__(self, plan: Plan, runs: Path, *, keeps_checkpoints: bool = False) -> None:
        self._plan, self._runs, self._keeps = plan, runs, keeps_checkpoints
        self._entries = [
            SizedEntry(name=entry.name, max_parameters=max_parameters)
            for entry in in_order_of_need(plan)
            for max_parameters in plan.caps_of(entry)
        ]
        self._results: dict[TrialID, TrialResult] = {}
        self._begun: dict[TrialID, Trial] = {}
        self._configs: dict[TrialID, RunConfig] = {}

    @property
    def total(self) -> int:
        """The number of trials, as far as it is known: an entry whose runs all failed is not run from other seeds."""
        return sum(
            len(self._tuning(entry))
            + (0 if self._has_failed(entry) else len(self._plan.seeds_of(self._settings(entry))) - 1)
            for entry in self._entries
        )

    @property
    def num_ended(self) -> int:
        return len(self._results)

    def next(self) -> Trial | None:
        """A trial that can begin now, and now counts as begun. Those that need no run are recorded on the way."""
        while True:
            recorded = len(self._results)
            for trial_id in self._open():
                trial = self._ready(trial_id)
                if trial is not None:
                    return trial
            if len(self._results) == recorded:
                return None

    def record(self, trial: Trial, result: TrialResult) -> None:
        """A trial that was begun has ended. Checkpoints that no trial waits for are removed."""
        (trial_id,) = (trial_id for trial_id, begun in self._begun.items() if begun.run_dir == trial.run_dir)
        del self._begun[trial_id]
        self._results[trial_id] = result
        self.drop_checkpoints()

    def drop_checkpoints(self) -> None:
        """Remove the checkpoints that no trial waits for."""
        if self._keeps:
            return
        for trial_id in self._results:
            if not self._is_awaited(trial_id):
                drop_checkpoint(self._run_dir(trial_id))

    def results(self) -> list[TrialResult]:
        """Of all trials that have ended, in the order of the plan."""
        found = []
        for settings in self._plan.methods:
            rates = self._plan.rates_of(settings)
            for entry in (entry for entry in self._entries if entry.name == settings.name):
                chosen = self._chosen(entry)
                has_choice = len(rates) > 1 and not self._has_failed(entry)
                for trial_id in self._known(entry):
                    if trial_id in self._results:
                        is_chosen = trial_id.learning_rate == chosen
                        at_end = is_chosen and has_choice and chosen in (rates[0], rates[-1])
                        found.append(replace(self._results[trial_id], chosen=is_chosen, rate_at_end=at_end))
        return found

    def _settings(self, entry: SizedEntry) -> MethodEntry:
        return self._plan.entry(entry.name)

    def _tuning(self, entry: SizedEntry) -> list[TrialID]:
        settings = self._settings(entry)
        seed = self._plan.seeds_of(settings)[0]
        return [TrialID(entry=entry, learning_rate=rate, seed=seed) for rate in self._plan.rates_of(settings)]

    def _known(self, entry: SizedEntry) -> list[TrialID]:
        """The trials that are known to be wanted."""
        tuning, rate = self._tuning(entry), self._chosen(entry)
        if rate is None or self._has_failed(entry):
            return tuning
        seeds = self._plan.seeds_of(self._settings(entry))
        return tuning + [TrialID(entry=entry, learning_rate=rate, seed=seed) for seed in seeds[1:]]

    def _open(self) -> Iterator[TrialID]:
        for entry in self._entries:
            for trial_id in self._known(entry):
                if trial_id not in self._results and trial_id not in self._begun:
                    yield trial_id

    def _chosen(self, entry: SizedEntry) -> float | None:
        """The learning rate of the lowest validation BCE; the lowest rate if all failed; None while it is not known."""
        tuning = self._tuning(entry)
        if any(trial_id not in self._results for trial_id in tuning):
            return None

        def loss(trial_id: TrialID) -> float:
            result = self._results[trial_id]
            return result.validation_bce if result.error is None else float("inf")

        return min(tuning, key=loss).learning_rate

    def _has_failed(self, entry: SizedEntry) -> bool:
        return all(
            trial_id in self._results and self._results[trial_id].error is not None for trial_id in self._tuning(entry)
        )

    def _source(self, trial_id: TrialID) -> TrialID | None:
        """The trial that a derived one starts from, once it is known. It may have failed."""
        settings = self._settings(trial_id.entry)
        assert settings.derive is not None
        max_parameters = self._plan.source_cap(settings, trial_id.entry.max_parameters)
        entry = SizedEntry(name=settings.derive.source, max_parameters=max_parameters)
        rate = self._chosen(entry)
        if rate is None:
            return None
        if self._has_failed(entry):
            return self._tuning(entry)[0]
        return TrialID(entry=entry, learning_rate=rate, seed=trial_id.seed)

    def _ready(self, trial_id: TrialID) -> Trial | None:
        """The trial, if it can begin now. One that needs no run is recorded instead."""
        source = None
        if self._settings(trial_id.entry).derive is not None:
            source = self._source(trial_id)
            if source is None or source not in self._results:
                return None
            failure = self._results[source].error
            if failure is not None:
                name = self._run_dir(source).name
                self._record_failure(trial_id, f"the run it starts from, {name}, failed: {failure}")
                return None
        try:
            config = self._plan.configure(
                self._settings(trial_id.entry),
                max_parameters=trial_id.entry.max_parameters,
                seed=trial_id.seed,
                learning_rate=trial_id.learning_rate,
                source=None if source is None else self._run_dir(source),
            )
        except ValidationError as error:
            self._record_failure(trial_id, WrongValue.first_of(error, RunConfig).message)
            return None
        self._configs[trial_id] = config
        trial = Trial(
            name=trial_id.entry.name,
            config=config,
            run_dir=self._run_dir(trial_id),
            digest=self._digest(config, source),
            keeps_checkpoint=self._keeps or self._is_awaited(trial_id),
        )
        before = result_before(trial)
        if before is not None:
            self._results[trial_id] = before
            return None
        if source is not None and not checkpoint.exists(self._run_dir(source)):
            # It ended when no trial waited for it.
            del self._results[source]
            forget(self._run_dir(source))
            return self._ready(source)
        self._begun[trial_id] = trial
        return trial

    def _record_failure(self, trial_id: TrialID, error: str) -> None:
        """Record a trial that cannot be run, since there is no configuration for it."""
        self._results[trial_id] = TrialResult(
            name=trial_id.entry.name,
            method=self._settings(trial_id.entry).method,
            max_parameters=trial_id.entry.max_parameters,
            seed=trial_id.seed,
            learning_rate=trial_id.learning_rate,
            run=self._run_dir(trial_id).name,
            error=error,
        )

    def _digest(self, config: RunConfig, source: TrialID | None) -> str:
        """Of all that decides what a run comes to, wherever its folder is."""
        if source is None:
            return config_digest(config)
        assert config.derive is not None
        derives = self._settings(source.entry).derive is not None
        below = self._digest(self._configs[source], self._source(source) if derives else None)
        return config_digest(replace(config, derive=replace(config.derive, run=below)))

    def _run_dir(self, trial_id: TrialID) -> Path:
        entry = trial_id.entry
        cap = "" if entry.max_parameters is None else f"-{entry.max_parameters}"
        return self._runs / f"{self._settings(entry).slug}{cap}-lr{trial_id.learning_rate:g}-seed{trial_id.seed}"

    def _is_awaited(self, trial_id: TrialID) -> bool:
        """Whether some trial may still start from this one."""
        chosen = self._chosen(trial_id.entry)
        if chosen not in (None, trial_id.learning_rate):
            return False
        return any(
            self._plan.source_cap(settings, max_parameters) == trial_id.entry.max_parameters
            and not self._is_over(SizedEntry(name=settings.name, max_parameters=max_parameters), trial_id.seed)
            for settings in self._plan.derived_from(self._settings(trial_id.entry))
            for max_parameters in self._plan.caps_of(settings)
        )

    def _is_over(self, entry: SizedEntry, seed: int) -> bool:
        """Whether no trial of an entry with this seed will begin any more."""
        if seed not in self._plan.seeds_of(self._settings(entry)):
            return True
        if self._chosen(entry) is None:
            return False
        return all(trial_id in self._results for trial_id in self._known(entry) if trial_id.seed == seed)
