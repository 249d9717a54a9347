"""What changing a set of experts does to a measure, text by text, beside as many others changed alike.

    effect = set_effect(experts, measure, lambda chosen: view.edits(SwitchOff(chosen)), controls)
    effect.change, effect.excess       intervals over texts

Controls are sets of experts, as `sets.layer_matched` and `sets.anywhere` draw them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from moestro import sets, stats

Measure = Callable[[], ArrayLike]
"""Measures the model as it is at this moment: one number a text, always of the same texts."""
Values = Float[np.ndarray, " texts"]


@dataclass(frozen=True)
class SetEffect:
    """Means over texts, with their intervals."""

    whole: stats.Interval
    """The measure of the untouched model."""
    change: stats.Interval
    """Of the measure, when the set is changed."""
    control: stats.Interval
    """Of the measure, mean over the controls."""
    excess: stats.Interval
    """The set's change minus the controls'."""
    draws: tuple[float, ...]
    """Mean change of each control."""

    @property
    def p_larger(self) -> float:
        """How likely a control's change is as large, one-sided: 1 / (1 + draws) at the least."""
        return stats.exceeds(self.change.estimate, np.array(self.draws))

    @property
    def p_smaller(self) -> float:
        """How likely a control's change is as small."""
        return stats.exceeds(-self.change.estimate, -np.array(self.draws))


def set_effect(
    experts: Collection[sets.Member],
    measure: Measure,
    changed: Callable[[sets.Chosen], AbstractContextManager[Any]],
    controls: Iterable[Collection[sets.Member]],
) -> SetEffect:
    """The effect of entering `changed(experts)`, beside that of entering it with each control.

    Raises ValueError without controls, or for fewer than two texts.
    """
    others = [frozenset(c) for c in controls]
    if not others:
        raise ValueError("there is no control to compare with; draw at least one")
    whole = values_of(measure)
    own, *rest = (changed_by(measure, changed(chosen)) for chosen in (frozenset(experts), *others))
    return compared(whole, own, rest)


def values_of(measure: Measure) -> Values:
    """The measure as an array."""
    return np.asarray(measure(), dtype=np.float64)


def changed_by(measure: Measure, change: AbstractContextManager[Any]) -> Values:
    """The measure inside `change`."""
    with change:
        return values_of(measure)


def compared(whole: Values, own: Values, controls: Sequence[Values]) -> SetEffect:
    """The effect, from measures of the untouched model, of the changed one, and of each control: the same texts."""
    control = np.mean(controls, axis=0)
    return SetEffect(
        stats.bootstrap(whole),
        stats.difference(own, whole),
        stats.difference(control, whole),
        stats.difference(own, control),
        tuple(float((c - whole).mean()) for c in controls),
    )
