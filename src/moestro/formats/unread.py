"""Tensors of a checkpoint that transformers does not load: carried along, or left out with a word.

Above all next-token-prediction layers (MTP), which follow the trunk in DeepSeek-V3's and GLM's checkpoints and stand
under `mtp.` in Qwen's. They have experts of their own, and the config states one number of experts for all layers:
where the trunk was cut they are left out, and the config says that there are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

PREDICTORS = re.compile(r"^(num|n)_(nextn|mtp)|^(mtp|nextn)_num|^num.*(nextn|mtp)")
"""Names under which configs state how many next-token-prediction layers there are."""


@dataclass
class Unread:
    """What becomes of the tensors that transformers does not load."""

    carried: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """{why: names}"""
    predictors: bool = False
    """Whether the carried ones hold a next-token-prediction layer."""


def sort_unread(names: Iterable[str], stated: Mapping[str, Any], *, cut: bool, same_family: bool) -> Unread:
    """Carry what still belongs to the model.

    stated: config.json of the checkpoint. cut: whether the number of experts changed. same_family: whether the result
    is of the class that the checkpoint states, whose readers know what else is there.
    """
    unread = Unread()
    trunk = _trunk_layers(stated)
    names = list(names)
    predictors = [name for name in names if is_predictor(name, trunk)]
    others = [name for name in names if name not in set(predictors)]
    experts = any("expert" in name for name in predictors)
    if predictors and same_family and not (cut and experts):
        unread.carried += predictors
        unread.predictors = True
    elif predictors:
        why = (
            "next-token-prediction (MTP) layers have experts of their own, which were not cut with the others"
            if same_family
            else "the model is saved as another class than the checkpoint's"
        )
        unread.left_out[why] = predictors
    for name in others:
        if not same_family:
            unread.left_out.setdefault("the model is saved as another class than the checkpoint's", []).append(name)
        elif cut and "expert" in name:
            unread.left_out.setdefault("they belong to experts, whose number changed", []).append(name)
        else:
            unread.carried.append(name)
    return unread


def is_predictor(name: str, trunk: int | None) -> bool:
    """Whether a stored tensor is part of a next-token-prediction layer, behind `trunk` decoder layers."""
    if re.search(r"(^|[._])(mtp|nextn)([._]|$)", name):
        return True
    numbers = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    tower = re.search(r"vision|visual|audio|encoder", name)
    return trunk is not None and numbers is not None and tower is None and int(numbers.group(1)) >= trunk


def _trunk_layers(stated: Mapping[str, Any]) -> int | None:
    for place in (stated.get("text_config"), stated):
        if isinstance(place, Mapping) and type(place.get("num_hidden_layers")) is int:
            return int(place["num_hidden_layers"])
    return None


def state_no_predictors(config: Any) -> list[str]:
    """Let a config and its sub-configs state no next-token-prediction layer; returns the names that changed."""
    changed = []
    for place in _places(config):
        for key, value in vars(place).items():
            if type(value) is int and value > 0 and PREDICTORS.search(key):
                setattr(place, key, 0)
                changed.append(key)
    return changed


def _places(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if sub is not None:
            yield from _places(sub)


def in_words(names: list[str]) -> str:
    """Names of tensors, short: `model.layers.61.* (12 tensors)`."""
    parts: dict[str, list[str]] = {}
    for name in names:
        head = re.match(r".*?layers\.\d+|([^.]*\.)?mtp[^.]*|.*visual|.*vision[^.]*", name)
        parts.setdefault(head.group(0) if head else name, []).append(name)
    told = [f"{head}.* ({len(part)} tensors)" if len(part) > 1 else part[0] for head, part in parts.items()]
    return ", ".join(told[:4]) + (f" and {len(told) - 4} more" if len(told) > 4 else "")
