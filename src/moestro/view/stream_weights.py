"""Read a checkpoint part by part into a model without weights.

The model is built on the meta device, as `from_pretrained` builds it. Each group of stored tensors that transformers
converts together (the experts of a layer that become one `gate_up_proj`, say) is read, dequantised where it is
quantised, and handed to transformers' own conversion when it is asked for, so what is loaded is bit for bit what
`moestro.open` loads into memory.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import build_glob_alternation, convert_and_load_state_dict_in_model

from moestro.formats.hf import Group, no_bar, reading_plan, skeleton
from moestro.formats.source import Source, plain_dtype, without_quantisation
from moestro.view.checkpoint import model_class


class Weights:
    """A checkpoint directory's tensors and the model on the meta device that they belong to.

    Raises ValueError where the checkpoint is quantised in a way that is not read, or lacks tensors of the model.
    """

    def __init__(self, path: Path, config: Any, *, dtype: Any = "auto", device: str = "cpu"):
        self.path, self.device = path, device
        config, dtype = without_quantisation(config), plain_dtype(path, config, dtype)
        self.source = Source(path, dtype)
        self.files, self.stored = self.source.files, self.source.plain
        self.model: Any = skeleton(model_class(config), config, dtype)
        plan = self.model._get_dtype_plan(dtype)
        _cast(self.model, plan)
        self._conversions = get_model_conversion_mapping(self.model)
        self._load_config = modeling_utils.LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=plan,
            weight_mapping=self._conversions,  # type: ignore[arg-type]
        )
        self._config_as_opened = copy.deepcopy(self.model.config)
        self.groups, _ = reading_plan(self.model, self.stored, self._conversions)
        self._tie()
        self.model._weight_conversions = [c for c in self._conversions if c.was_used()]
        for tensor in self.model.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True  # what is in the files needs no initial values; other buffers do
        self.model._move_missing_keys_from_meta_to_device(set(), {"": device}, None, None)
        self.model._initialize_missing_keys(False)
        self.model.eval()

    def _tie(self) -> None:
        """Tie what the checkpoint stores once, as `from_pretrained` does; refuse where something else is missing."""
        by_layer = [(t, s) for t, s in self.model.all_tied_weights_keys.items() if re.search(r"\.\d+\.", t + " " + s)]
        if by_layer:
            raise ValueError(
                f"{type(self.model).__name__} ties {by_layer[0][0]} to {by_layer[0][1]}, so its layers cannot be "
                "loaded one at a time; open it in memory (stream=False)"
            )
        by_target = {target: group for group in self.groups for target in group.targets}
        missing = set(self.model.state_dict()) - by_target.keys()
        both = [
            (target, source)
            for target, source in self.model.all_tied_weights_keys.items()
            if target not in missing and source not in missing
        ]
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        for target, source in both:  # stored twice: one tensor if equal, two if not
            if self._same(by_target[target], by_target[source]):
                owner, _, attr = target.rpartition(".")
                setattr(self.model.get_submodule(owner), attr, self.model.get_parameter(source))
                self.groups.remove(by_target[target])
            else:
                self.model.all_tied_weights_keys.pop(target)
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing)} tensors of {type(self.model).__name__}, {min(missing)} for one; "
                "it is incomplete, or of another family than its config says"
            )

    def _same(self, a: Group, b: Group) -> bool:
        pairs = [(self.stored[x], self.stored[y]) for x, y in zip(a.keys, b.keys)]
        return len(a.keys) == len(b.keys) and all(
            x.shape == y.shape and x.dtype == y.dtype and torch.equal(x[...], y[...]) for x, y in pairs
        )

    def under(self, *prefixes: str) -> list[Group]:
        """The groups with a tensor in one of these modules (names that end with a dot)."""
        return [g for g in self.groups if any(t.startswith(prefixes) for t in g.targets)]

    def size_of(self, groups: Iterable[Group]) -> int:
        return sum(self.stored[key].nbytes for group in groups for key in group.keys)

    def load(self, groups: Sequence[Group]) -> None:
        """Put these tensors into the model. Raises ValueError where a stored shape does not fit."""
        config, self.model.config = self.model.config, self._config_as_opened
        parts = {key: self.stored[key] for group in groups for key in group.keys}
        try:
            with no_bar():
                info, _ = convert_and_load_state_dict_in_model(self.model, parts, self._load_config)
        finally:
            self.model.config = config
        if info.conversion_errors or info.mismatched_keys:
            problems = [f"{k}: {str(v).splitlines()[-1]}" for k, v in info.conversion_errors.items()]
            problems += [f"{k} has shape {tuple(a)}, not {tuple(b)}" for k, a, b in info.mismatched_keys]
            raise ValueError(f"{self.path} does not fit {type(self.model).__name__}: {'; '.join(sorted(problems)[:3])}")

    def fetch(self, groups: Iterable[Group]) -> None:
        """Read ahead what `load` of these groups will want."""
        for group in groups:
            for key in group.keys:
                self.stored[key].fetch()

    def forget(self) -> None:
        """Drop what was read ahead."""
        for stored in self.stored.values():
            stored.forget()


def _cast(model: nn.Module, plan: Mapping[str, torch.dtype]) -> None:
    """Give the tensors that the family keeps in fp32 their type already now."""
    if not plan:
        return
    pattern, policy, _ = build_glob_alternation(list(plan))
    for name, tensor in model.state_dict(keep_vars=True).items():
        found = pattern.search(name)
        if found is not None and found.lastgroup is not None and tensor.is_floating_point():
            tensor.data = tensor.data.to(plan[policy[found.lastgroup]])
