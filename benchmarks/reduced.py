"""Plans that are reduced until they are short enough to be run now and then."""

from dataclasses import replace
from typing import TypeVar

from torchrec_cce.experiments.plan import MethodEntry, Plan

T = TypeVar("T", int, float)


def reduced(plan: Plan) -> Plan:
    """A plan at one cap, from one seed and at one learning rate, each the middle one."""

    def shortened(entry: MethodEntry) -> MethodEntry:
        return replace(
            entry,
            caps=entry.caps and _middle(entry.caps),
            learning_rates=entry.learning_rates and _middle(entry.learning_rates),
            seeds=entry.seeds and entry.seeds[:1],
        )

    return replace(
        plan,
        methods=tuple(shortened(entry) for entry in plan.methods),
        caps=plan.caps and _middle(plan.caps),
        learning_rates=_middle(plan.learning_rates),
        seeds=plan.seeds[:1],
    )


def _middle(values: tuple[T, ...]) -> tuple[T, ...]:
    return (sorted(values)[(len(values) - 1) // 2],)
