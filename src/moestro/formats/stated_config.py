"""The config.json of a saved checkpoint: what transformers writes, and what the source stated under its own names.

transformers 5 renames and drops keys when it reads a config (`num_experts` of Qwen3-MoE becomes `num_local_experts`;
`rope_theta`, `rope_scaling` and `partial_rotary_factor` move into `rope_parameters`; `scoring_func` goes). transformers
4, vLLM, mlx-lm and llama.cpp's converter read the old names, and take a default where there is none. So every key that
the source stated stays stated, with the new number where the number changed. What is added is checked: transformers
must read the same config with it as without it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

NOT_CARRIED = {
    "_name_or_path",
    "_commit_hash",
    "architectures",
    "auto_map",  # names code that does not come along
    "per_layer_config",
    "quantization_config",  # says how the weights are stored, so it is the format's
    "transformers_version",
}
ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Where readers other than transformers 5 look for `rope_parameters`."""

Path_ = tuple[str, ...]


def stated_config(
    config: PreTrainedConfig,
    source: Mapping[str, Any] | None = None,
    opened: PreTrainedConfig | None = None,
    *,
    counts: Sequence[re.Pattern[str]] = (),
) -> dict[str, Any]:
    """What config.json has to say for `config`, as plain data.

    source: the config.json that the model came from, as it was written. opened: what transformers reads from it.
    counts: patterns of names of numbers that a cut changes; a number under such a name that transformers does not know
        follows those that it knows.
    Beside what the source states stand the family's other names and the older names of RoPE: a source that was itself
    written by transformers 5 states them no more, and the other readers want them all the same.
    """
    plain: dict[str, Any] = json.loads(config.to_json_string())
    for key in ("auto_map", "quantization_config"):
        plain.pop(key, None)
    wanted = plain
    if source is not None and opened is not None and type(opened) is type(config):
        changed = changed_numbers(opened, config, counts)
        plain |= {  # what transformers only passes on
            key: _recounted(key, value, changed, counts)
            for key, value in plain.items()
            if key not in getattr(type(config), "__dataclass_fields__", {})
        }
        names = source.get("architectures") or []
        if names and not any(hasattr(transformers, name) for name in names):
            plain["architectures"] = names  # the hub's name of the family's class, by which other readers know it
        wanted = _merged(plain, source, opened, config, changed, counts)
    return _checked(type(config), plain, _with_other_names(wanted, config, counts))


def _merged(
    plain: Mapping[str, Any],
    source: Mapping[str, Any],
    before: Any,
    now: Any,
    changed: Sequence[Mapping[int, int]],
    counts: Sequence[re.Pattern[str]],
) -> dict[str, Any]:
    """`plain` and what `source` states beside it. `before`, `now`: the configs that transformers has for the two."""
    merged = dict(plain)
    same_rope = _attribute(before, "rope_parameters") == _attribute(now, "rope_parameters")
    for key, value in source.items():
        if key in NOT_CARRIED:
            continue
        old, new = _attribute(before, key), _attribute(now, key)
        if isinstance(value, dict) and isinstance(old, PreTrainedConfig) and isinstance(new, PreTrainedConfig):
            merged[key] = _merged(plain.get(key, {}), value, old, new, changed, counts)
        elif key in plain:
            continue
        elif key == "torch_dtype":
            merged[key] = plain.get("dtype", value)
        elif key in ROPE:
            if same_rope:
                merged[key] = value
            elif key in (names := rope_names(now)):
                merged[key] = names[key]
        elif old is not None and old != new:
            merged[key] = _plain_value(new)
        else:
            merged[key] = _recounted(key, value, changed, counts)
    return merged


def read_config(family: type[PreTrainedConfig], stated: Mapping[str, Any]) -> PreTrainedConfig:
    """The config that transformers makes of what a config.json states."""
    return family.from_dict(family._decode_special_floats(copy.deepcopy(dict(stated))))


def part_for(config: Any, stated: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a config.json states for a model of this config: all of it, or the part that its text model has.

    None where it states another model.
    """
    if stated.get("model_type") == config.model_type:
        return dict(stated)
    for value in stated.values():
        if isinstance(value, dict) and value.get("model_type") == config.model_type:
            return value
    return None


def changed_numbers(before: Any, now: Any, counts: Sequence[re.Pattern[str]]) -> list[dict[int, int]]:
    """For each pattern, {old number: new number} over the fields of that name, sub-configs included."""
    found: list[dict[int, int]] = [{} for _ in counts]
    for old, new in _pairs(before, now):
        for pattern, numbers in zip(counts, found):
            for key, value in vars(old).items():
                if type(value) is int and pattern.search(key) and type(after := vars(new).get(key)) is int:
                    numbers[value] = after
    return found


def _pairs(before: Any, now: Any) -> Iterator[tuple[Any, Any]]:
    yield before, now
    for name in getattr(before, "sub_configs", {}):
        old, new = getattr(before, name, None), getattr(now, name, None)
        if old is not None and new is not None:
            yield from _pairs(old, new)


def _recounted(key: str, value: Any, changed: Sequence[Mapping[int, int]], counts: Sequence[re.Pattern[str]]) -> Any:
    for pattern, numbers in zip(counts, changed):
        if type(value) is int and pattern.search(key):
            return numbers.get(value, value)
        if isinstance(value, list) and pattern.search(key):  # one for each stack of experts
            return [numbers.get(n, n) if type(n) is int else n for n in value]
    return value


def _with_other_names(plain: Mapping[str, Any], config: Any, counts: Sequence[re.Pattern[str]]) -> dict[str, Any]:
    """`plain`, and the names under which the hub's checkpoints of the family state the same, where they are missing."""
    merged = dict(plain)
    for name in getattr(config, "attribute_map", {}):
        value = _attribute(config, name)
        if type(value) is int and any(pattern.search(name) for pattern in counts):
            merged.setdefault(name, value)
    for name, value in rope_names(config).items():
        merged.setdefault(name, value)
    if "dtype" in plain:
        merged.setdefault("torch_dtype", plain["dtype"])
    for name in getattr(config, "sub_configs", {}):
        if isinstance(plain.get(name), dict) and isinstance(sub := _attribute(config, name), PreTrainedConfig):
            merged[name] = _with_other_names(plain[name], sub, counts)
    return merged


def rope_names(config: Any) -> dict[str, Any]:
    """`rope_parameters` under the older names; empty where they differ by type of layer, which these cannot say."""
    parameters = _attribute(config, "rope_parameters")
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        return {}
    own = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    names = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
    scaled = own.get("rope_type", "default") != "default" or own.keys() - {"rope_type", "type"}
    return names | {"rope_scaling": own if scaled else None}


def _checked(family: type[PreTrainedConfig], plain: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """`wanted` without the additions that would make transformers read another config than `plain`."""
    expected = _read(family, plain)
    if _same(_read(family, wanted), expected):
        return wanted
    added = list(_additions(plain, wanted))
    for path in added:
        if _same(_read(family, shorter := _without(wanted, [path])), expected):
            return shorter
    kept = copy.deepcopy(plain)
    for path in added:
        more = _without(wanted, [p for p in added if p != path and not _holds(kept, p)])
        if _same(_read(family, more), expected):
            kept = more
    return kept


def _read(family: type[PreTrainedConfig], stated: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config that transformers makes of it; None where it refuses."""
    try:
        config = read_config(family, stated)
    except Exception:  # whatever a family's config says: the addition is then left out
        return None
    read: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return read


def _same(read: Any, expected: Any) -> bool:
    """Whether everything in `expected` reads the same; keys that transformers does not know may stand beside."""
    if isinstance(read, dict) and isinstance(expected, dict):
        return all(key in read and _same(read[key], value) for key, value in expected.items())
    return bool(read == expected)


def _additions(plain: Mapping[str, Any], wanted: Mapping[str, Any], at: Path_ = ()) -> Iterator[Path_]:
    for key, value in wanted.items():
        if key not in plain:
            yield (*at, key)
        elif isinstance(value, dict) and isinstance(plain[key], dict):
            yield from _additions(plain[key], value, (*at, key))


def _without(stated: Mapping[str, Any], paths: Sequence[Path_]) -> dict[str, Any]:
    left = copy.deepcopy(dict(stated))
    for *parents, key in paths:
        place = left
        for parent in parents:
            place = place[parent]
        place.pop(key, None)
    return left


def _holds(stated: Any, path: Path_) -> bool:
    for key in path:
        if not isinstance(stated, dict) or key not in stated:
            return False
        stated = stated[key]
    return True


def _attribute(config: Any, name: str) -> Any:
    """An attribute of a config under any of its names; None where it has none. Layers may state their own beside it."""
    held = vars(config)
    name = getattr(config, "attribute_map", {}).get(name, name)
    if name in held or config.is_heterogeneous:
        return held.get(name)
    return getattr(config, name, None)


def _plain_value(value: Any) -> Any:
    if isinstance(value, PreTrainedConfig):
        return json.loads(value.to_json_string())
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value
