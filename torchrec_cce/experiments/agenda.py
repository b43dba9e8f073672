"""What of a plan is still to be run, in which order, and what came of the rest."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from torchrec_cce.experiments.outcome import Outcome
from torchrec_cce.experiments.plan import MethodEntry, Plan, in_order_of_need
from torchrec_cce.experiments.trial import Ended, Trial, drop_checkpoint, ended_before, forget
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config import RunConfig, config_digest
from torchrec_cce.training.config_file import WrongValue


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A method with its settings, under a cap: what has one learning rate."""

    entry: str
    cap: int | None


@dataclass(frozen=True, kw_only=True)
class Key:
    """A trial, by what it is one of."""

    setting: Setting
    learning_rate: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """A trial that has ended."""

    key: Key
    method: str
    chosen: bool
    """Whether this learning rate is the one that was chosen."""
    rate_at_end: bool
    """Whether the chosen rate is the lowest or the highest of several that were tried."""
    config: RunConfig | None
    """None if there can be none."""
    run: str
    """Name of the folder."""
    ended: Ended

    @property
    def outcome(self) -> Outcome | None:
        return self.ended.outcome


class Agenda:
    """The trials of a plan, whose runs are folders of `runs`.

    The first seed of a setting tries each learning rate; the one with the lowest validation BCE is chosen, and the
    other seeds run with it. A derived trial waits for the run that it starts from.
    """

    def __init__(self, plan: Plan, runs: Path, *, keeps_checkpoints: bool = False) -> None:
        self._plan, self._runs, self._keeps = plan, runs, keeps_checkpoints
        self._settings = [
            Setting(entry=entry.name, cap=cap) for entry in in_order_of_need(plan) for cap in plan.caps_of(entry)
        ]
        self._ended: dict[Key, Ended] = {}
        self._begun: dict[Key, Trial] = {}
        self._configs: dict[Key, RunConfig] = {}

    @property
    def total(self) -> int:
        """Trials, as far as is known: none of a setting whose runs all failed is run from another seed."""
        return sum(
            len(self._tuning(setting))
            + (0 if self._has_failed(setting) else len(self._plan.seeds_of(self._entry(setting))) - 1)
            for setting in self._settings
        )

    @property
    def num_ended(self) -> int:
        return len(self._ended)

    def next(self) -> Trial | None:
        """A trial that can begin now, and now counts as begun. Those that need no run are recorded on the way."""
        while True:
            recorded = len(self._ended)
            for key in self._open():
                trial = self._ready(key)
                if trial is not None:
                    return trial
            if len(self._ended) == recorded:
                return None

    def record(self, trial: Trial, ended: Ended) -> None:
        """A trial that was begun has ended. Checkpoints that nobody waits for are removed."""
        (key,) = (key for key, begun in self._begun.items() if begun.run_dir == trial.run_dir)
        del self._begun[key]
        self._ended[key] = ended
        self.drop_checkpoints()

    def drop_checkpoints(self) -> None:
        """Remove those that nobody waits for."""
        if self._keeps:
            return
        for key in self._ended:
            if not self._is_awaited(key):
                drop_checkpoint(self._run_dir(key))

    def records(self) -> list[Record]:
        """Of all that has ended, in the order of the plan."""
        found = []
        for entry in self._plan.methods:
            rates = self._plan.rates_of(entry)
            for setting in (one for one in self._settings if one.entry == entry.name):
                chosen = self._chosen(setting)
                has_choice = len(rates) > 1 and not self._has_failed(setting)
                for key in self._known(setting):
                    if key not in self._ended:
                        continue
                    is_chosen = key.learning_rate == chosen
                    found.append(
                        Record(
                            key=key,
                            method=entry.method,
                            chosen=is_chosen,
                            rate_at_end=is_chosen and has_choice and chosen in (rates[0], rates[-1]),
                            config=self._configs.get(key),
                            run=self._run_dir(key).name,
                            ended=self._ended[key],
                        )
                    )
        return found

    def _entry(self, setting: Setting) -> MethodEntry:
        return self._plan.entry(setting.entry)

    def _tuning(self, setting: Setting) -> list[Key]:
        entry = self._entry(setting)
        seed = self._plan.seeds_of(entry)[0]
        return [Key(setting=setting, learning_rate=rate, seed=seed) for rate in self._plan.rates_of(entry)]

    def _known(self, setting: Setting) -> list[Key]:
        """The trials that are known to be wanted."""
        tuning, rate = self._tuning(setting), self._chosen(setting)
        if rate is None or self._has_failed(setting):
            return tuning
        seeds = self._plan.seeds_of(self._entry(setting))
        return tuning + [Key(setting=setting, learning_rate=rate, seed=seed) for seed in seeds[1:]]

    def _open(self) -> Iterator[Key]:
        for setting in self._settings:
            for key in self._known(setting):
                if key not in self._ended and key not in self._begun:
                    yield key

    def _chosen(self, setting: Setting) -> float | None:
        """The learning rate of the lowest validation BCE; the lowest rate if all failed; None while it is not known."""
        tuning = self._tuning(setting)
        if any(key not in self._ended for key in tuning):
            return None
        return min(tuning, key=lambda key: _loss(self._ended[key])).learning_rate

    def _has_failed(self, setting: Setting) -> bool:
        return all(key in self._ended and self._ended[key].error is not None for key in self._tuning(setting))

    def _source(self, key: Key) -> Key | None:
        """The trial that a derived one starts from, once it is known. It may have failed."""
        entry = self._entry(key.setting)
        assert entry.derive is not None
        setting = Setting(entry=entry.derive.source, cap=self._plan.source_cap(entry, key.setting.cap))
        rate = self._chosen(setting)
        if rate is None:
            return None
        if self._has_failed(setting):
            return self._tuning(setting)[0]
        return Key(setting=setting, learning_rate=rate, seed=key.seed)

    def _ready(self, key: Key) -> Trial | None:
        """The trial, if it can begin now. One that needs no run is recorded instead."""
        source = None
        if self._entry(key.setting).derive is not None:
            source = self._source(key)
            if source is None or source not in self._ended:
                return None
            failure = self._ended[source].error
            if failure is not None:
                name = self._run_dir(source).name
                self._ended[key] = Ended(error=f"the run it starts from, {name}, failed: {failure}")
                return None
        config = self._config_of(key)
        if isinstance(config, str):
            self._ended[key] = Ended(error=config)
            return None
        self._configs[key] = config
        run_dir, digest = self._run_dir(key), self._digest(config, source)
        before = ended_before(run_dir, digest)
        if before is not None:
            self._ended[key] = before
            return None
        if source is not None and not checkpoint.exists(self._run_dir(source)):
            # It ended when nobody waited for it.
            del self._ended[source]
            forget(self._run_dir(source))
            return self._ready(source)
        trial = Trial(
            name=key.setting.entry,
            config=config,
            run_dir=run_dir,
            digest=digest,
            keeps_checkpoint=self._keeps or self._is_awaited(key),
        )
        self._begun[key] = trial
        return trial

    def _config_of(self, key: Key) -> RunConfig | str:
        """The configuration of a run, or why there is none."""
        entry = self._entry(key.setting)
        source = self._source(key) if entry.derive is not None else None
        try:
            return self._plan.configure(
                entry,
                cap=key.setting.cap,
                seed=key.seed,
                learning_rate=key.learning_rate,
                source=None if source is None else self._run_dir(source),
            )
        except ValidationError as error:
            return WrongValue.first_of(error, RunConfig).message

    def _digest(self, config: RunConfig, source: Key | None) -> str:
        """Of all that decides what a run comes to, wherever its folder is."""
        if source is None:
            return config_digest(config)
        assert config.derive is not None
        derives = self._entry(source.setting).derive is not None
        below = self._digest(self._configs[source], self._source(source) if derives else None)
        return config_digest(replace(config, derive=replace(config.derive, run=below)))

    def _run_dir(self, key: Key) -> Path:
        cap = "" if key.setting.cap is None else f"-{key.setting.cap}"
        return self._runs / f"{self._entry(key.setting).slug}{cap}-lr{key.learning_rate:g}-seed{key.seed}"

    def _is_awaited(self, key: Key) -> bool:
        """Whether some trial may still start from this one."""
        chosen = self._chosen(key.setting)
        if chosen not in (None, key.learning_rate):
            return False
        return any(
            self._plan.source_cap(entry, cap) == key.setting.cap
            and not self._is_over(Setting(entry=entry.name, cap=cap), key.seed)
            for entry in self._plan.derived_from(self._entry(key.setting))
            for cap in self._plan.caps_of(entry)
        )

    def _is_over(self, setting: Setting, seed: int) -> bool:
        """Whether no trial of a setting with this seed will begin any more."""
        if seed not in self._plan.seeds_of(self._entry(setting)):
            return True
        if self._chosen(setting) is None:
            return False
        return all(key in self._ended for key in self._known(setting) if key.seed == seed)


def _loss(ended: Ended) -> float:
    """What a learning rate is chosen by; a run that failed is the worst."""
    return float("inf") if ended.outcome is None or ended.error is not None else ended.outcome.validation_bce
