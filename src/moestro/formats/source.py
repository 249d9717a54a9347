"""The checkpoint directory that a model came from: what it states, what it holds and what lies beside the weights."""

from __future__ import annotations

import copy
import json
import os
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import modeling_utils

from moestro.formats import quantised
from moestro.formats.quantised import Dequantised
from moestro.formats.tensors import Stored, close, has_weights, header, weight_files


def quantisation_of(stated: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` in a config.json, of a text model inside another too; None where there is none."""
    for place in (stated, stated.get("text_config"), stated.get("thinker_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(place, Mapping) and place.get(key):
                return dict(place[key])
    return None


def stated_in(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory, as it was written."""
    stated: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return stated


def without_quantisation(config: Any) -> Any:
    """A copy of a config that says nothing of quantised weights: for a model that gets them dequantised."""
    config = copy.deepcopy(config)
    for place in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        for key in ("quantization_config", "compression_config"):
            if place is not None:
                vars(place).pop(key, None)
    return config


def plain_dtype(path: Path, config: Any, dtype: Any = "auto") -> torch.dtype:
    """The type that `from_pretrained(path, dtype=...)` gives the model; bf16 where only quantised weights would say."""
    if dtype in (None, "auto") and config.dtype is None and quantisation_of(stated_in(path)) is not None:
        return torch.bfloat16
    files = [str(file) for file in weight_files(path)]
    found: torch.dtype = modeling_utils._get_dtype(dtype, files, copy.deepcopy(config), None, None, True)[1]
    return found


class Source:
    """A checkpoint directory. Its files stay open, so that what is read is what was there when it was opened.

    dtype: of what is dequantised. strict: a directory whose weights cannot be read is refused; else it has none, and
    what it states and holds beside them is still there.

    Raises:
        FileNotFoundError: there are no safetensors files.
        ValueError: the checkpoint is quantised in a way that is not read here; nothing has been loaded.
    """

    def __init__(self, path: Path, dtype: torch.dtype = torch.bfloat16, *, strict: bool = True):
        self.path = path
        self.stated = stated_in(path)
        self.quantisation = quantisation_of(self.stated)
        self.files: list[Path] = []
        if strict or self._readable():
            if self.quantisation is not None:
                quantised.check_method(path, self.quantisation)
            self.files = weight_files(path)
        else:
            self.quantisation = None
        opened = [os.open(file, os.O_RDONLY) for file in self.files]
        weakref.finalize(self, close, opened)
        self.stored: dict[str, Stored] = {k: t for f, fd in zip(self.files, opened) for k, t in header(f, fd)}
        self.plain: Mapping[str, Stored | Dequantised] = self.stored
        """What a plain checkpoint of the same model would hold."""
        if self.quantisation is not None:
            self.plain = quantised.dequantised(self.stored, self.quantisation, dtype)

    def _readable(self) -> bool:
        """Whether there are weights of a kind that is read here."""
        known = self.quantisation is None or self.quantisation.get("quant_method") in quantised.METHODS
        return known and has_weights(self.path)

    @property
    def nbytes(self) -> int:
        """Size of the tensors in the files."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    @property
    def plain_nbytes(self) -> int:
        """Size of the tensors once they are dequantised."""
        return sum(tensor.nbytes for tensor in self.plain.values())

    @cached_property
    def requantiser(self) -> quantised.Requantiser:
        """Writes plain tensors in the format of this checkpoint."""
        return quantised.Requantiser(self.plain)

    def parts_of(self, key: str, *, raw: bool) -> dict[str, Stored | Dequantised]:
        """{name: tensor} to write for a plain tensor; `raw`: as it is stored in the files."""
        tensor = self.plain[key]
        if raw and isinstance(tensor, Dequantised):
            return {key + suffix: part for suffix, part in tensor.parts.items()}
        return {key: tensor}
