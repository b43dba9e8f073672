"""`Plan`: what a comparison runs, checked before anything is read or built."""

import json
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from torchrec_cce.methods.registry import Method
from torchrec_cce.training.config import RunConfig, parse_config
from torchrec_cce.training.config_file import WrongValue, read_toml
from torchrec_cce.training.recluster_config import LearningRate
from torchrec_cce.training.rowwise import Bits
from torchrec_cce.training.unused import find_unused

_STRICT = ConfigDict(extra="forbid", populate_by_name=True)
_NO_CAP = 2**62
"""No table is larger, so that none is compressed."""

Seeds = Annotated[tuple[int, ...], Field(min_length=1)]
Caps = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
Rates = Annotated[tuple[LearningRate, ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DeriveFrom:
    """Another entry, from whose finished run of the same seed an entry's run starts: see `[derive]` of a run."""

    source: Annotated[str, Field(alias="from")]
    """The name of the other entry; `from` in a file."""
    cap_factor: PositiveFloat = 1.0
    """The other entry's cap over this entry's. Full tables have none."""
    circular: bool = False
    dense: bool = True
    bits: Bits | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MethodEntry:
    """One method with its settings, under every cap and from every seed."""

    method: Method
    name: str = ""
    """What reports call the entry; the method if not given."""
    num_columns: PositiveInt | None = None
    num_terms: PositiveInt | None = None
    use_helper: bool | None = None
    caps: Caps | None = None
    learning_rates: Rates | None = None
    seeds: Seeds | None = None
    """These three are in place of the plan's."""
    derive: DeriveFrom | None = None
    data: dict[str, Any] = field(default_factory=dict)
    embedding: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    recluster: dict[str, Any] = field(default_factory=dict)
    residents: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    """These seven say what differs from the sections of the plan's `[run]`."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.method)
        if not self.slug:
            raise ValueError(f"name={self.name!r} names a folder and needs a letter or a digit")
        if self.method == "full" and self.caps is not None:
            raise ValueError(f"caps={list(self.caps)}: full tables have none")

    @property
    def slug(self) -> str:
        """The name, as the names of the runs' folders begin with it."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Plan:
    """Methods × caps × seeds on one log, each method under each cap at the best of a few learning rates."""

    run: RunConfig
    """What all runs share. Each trial has its own method, cap, learning rate of the tables, seed and `derive`."""
    methods: Annotated[tuple[MethodEntry, ...], Field(min_length=1)]
    seeds: Seeds = (0,)
    """The learning rate is chosen with the first seed."""
    caps: Caps | None = None
    """Trained parameters of a table at most."""
    learning_rates: Rates = (0.05,)
    """Of the embedding tables."""

    def __post_init__(self) -> None:
        if self.run.data.validation is None or self.run.data.test is None:
            raise WrongValue(["run"], "a comparison needs data.validation and data.test")
        if (unused := find_unused(self.run)) is not None:
            keys, message = unused
            raise WrongValue(["run", *keys], message)
        if self.run.derive is not None:
            raise WrongValue(["run", "derive"], "is for an entry of [[methods]], which names the one it starts from")
        if self.run.registry.url is not None:
            raise WrongValue(["run", "registry", "url"], "the runs of a comparison publish nothing; leave it out")
        slugs: dict[str, str] = {}
        for i, entry in enumerate(self.methods):
            if entry.slug in slugs:
                both = f"{slugs[entry.slug]!r} and {entry.name!r}"
                raise WrongValue(["methods", str(i), "name"], f"{both} name the same folder; choose another name")
            slugs[entry.slug] = entry.name
            if entry.method != "full" and self.caps is None and entry.caps is None:
                raise WrongValue(["methods", str(i)], f"{entry.name!r} needs caps, its own or those of the plan")
        for i, entry in enumerate(self.methods):
            self._check_source(entry, ["methods", str(i), "derive"])
            self._check_sections(entry, ["methods", str(i)])

    def _check_source(self, entry: MethodEntry, keys: list[str]) -> None:
        above, at = [entry.name], entry
        while at.derive is not None:
            source = self._by_name().get(at.derive.source)
            if source is None:
                names = ", ".join(map(repr, self._by_name()))
                raise WrongValue([*keys, "from"], f"{at.derive.source!r} is no entry; allowed: {names}")
            if source.name in above:
                circle = " from ".join(map(repr, [*above, source.name]))
                raise WrongValue([*keys, "from"], f"{circle}: a circle")
            missing = [seed for seed in self.seeds_of(at) if seed not in self.seeds_of(source)]
            if missing:
                raise WrongValue([*keys, "from"], f"{source.name!r} has no runs from seeds {missing} of {at.name!r}")
            above.append(source.name)
            at = source

    def _check_sections(self, entry: MethodEntry, keys: list[str]) -> None:
        """Raise WrongValue for what cannot be configured under any cap."""
        max_parameters = None if entry.method == "full" else _NO_CAP
        try:
            self.configure(entry, max_parameters=max_parameters, seed=0, learning_rate=1.0, source=Path("source"))
        except ValidationError as error:
            wrong = WrongValue.first_of(error, RunConfig)
            own = wrong.keys[1:] if wrong.keys[:1] == ["embedding"] and not entry.embedding else wrong.keys
            raise WrongValue([*keys, *own], f"{wrong.message} (in {entry.name!r})") from error

    def _by_name(self) -> dict[str, MethodEntry]:
        return {entry.name: entry for entry in self.methods}

    def entry(self, name: str) -> MethodEntry:
        return self._by_name()[name]

    def seeds_of(self, entry: MethodEntry) -> tuple[int, ...]:
        return tuple(dict.fromkeys(entry.seeds or self.seeds))

    def rates_of(self, entry: MethodEntry) -> tuple[float, ...]:
        """Ascending."""
        return tuple(sorted(set(entry.learning_rates or self.learning_rates)))

    def caps_of(self, entry: MethodEntry) -> list[int | None]:
        """The caps of an entry, and those that others need to start from it."""
        if entry.method == "full":
            return [None]
        found: list[int | None] = list(entry.caps or self.caps or ())
        for other in self.derived_from(entry):
            found += [self.source_cap(other, max_parameters) for max_parameters in self.caps_of(other)]
        return list(dict.fromkeys(found))

    def derived_from(self, entry: MethodEntry) -> list[MethodEntry]:
        """The entries that start from `entry`."""
        return [other for other in self.methods if other.derive is not None and other.derive.source == entry.name]

    def source_cap(self, entry: MethodEntry, max_parameters: int | None) -> int | None:
        """The cap of the run that a derived entry starts from, whose own cap is `max_parameters`."""
        assert entry.derive is not None
        if self.entry(entry.derive.source).method == "full" or max_parameters is None:
            return None
        return round(max_parameters * entry.derive.cap_factor)

    def configure(
        self,
        entry: MethodEntry,
        *,
        max_parameters: int | None,
        seed: int,
        learning_rate: float,
        source: Path | None = None,
    ) -> RunConfig:
        """The configuration of one run.

        Args:
            source: the folder of the run that a derived one starts from.

        Raises:
            ValidationError: of pydantic; e.g. the method cannot be made under the cap.
        """
        values = self.run.as_dict()
        for section in ("data", "embedding", "model", "optimizer", "recluster", "training"):
            values[section] = _merged(values[section], getattr(entry, section))
        if entry.residents:
            values["residents"] = entry.residents
        given = {name: getattr(entry, name) for name in ("num_columns", "num_terms", "use_helper")}
        values["embedding"] |= {name: value for name, value in given.items() if value is not None}
        values["embedding"] |= {"method": entry.method, "max_parameters": max_parameters}
        values["optimizer"] |= {"embedding_learning_rate": learning_rate}
        values["seed"] = seed
        if entry.derive is not None:
            changes = {name: getattr(entry.derive, name) for name in ("circular", "dense", "bits")}
            values["derive"] = {"run": str(source), **changes}
        return parse_config(values)


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` in place of its own, in sections of sections too."""
    found = dict(values)
    for key, change in changes.items():
        own = found.get(key)
        found[key] = _merged(own, change) if isinstance(own, dict) and isinstance(change, dict) else change
    return found


_ADAPTER = TypeAdapter(Plan)


def parse_plan(values: Mapping[str, Any], *, sections: Mapping[str, Any] | None = None) -> Plan:
    """A Plan from plain values, e.g. parsed TOML.

    Args:
        sections: sections of `run` that `values` does not have, e.g. the data and tables of a prepared log.

    Raises:
        WrongValue: what is wrong, and where.
    """
    run: dict[str, Any] = {**values.get("run", {}), **(sections or {})}
    run["embedding"] = {"method": "full"} | run.get("embedding", {})
    try:
        base = parse_config(run)
    except ValidationError as error:
        wrong = WrongValue.first_of(error, RunConfig)
        raise WrongValue(["run", *wrong.keys], wrong.message) from error
    try:
        return _ADAPTER.validate_json(json.dumps({**values, "run": base.as_dict()}, default=str), strict=True)
    except ValidationError as error:
        raise WrongValue.first_of(error, Plan) from error


def read_plan(path: str | Path, *, sections: Mapping[str, Any] | None = None) -> Plan:
    """Read and check a TOML file.

    Raises:
        ConfigError: one line, `path:line: key: what is wrong`.
    """
    return read_toml(path, lambda values: parse_plan(values, sections=sections))


def in_order_of_need(plan: Plan) -> list[MethodEntry]:
    """The entries that others start from first, so that these do not wait for them in the end."""

    def followers(entry: MethodEntry) -> int:
        """Length of the longest chain of entries that each start from the one before."""
        return max((1 + followers(other) for other in plan.derived_from(entry)), default=0)

    return sorted(plan.methods, key=followers, reverse=True)
