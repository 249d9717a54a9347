"""Calibration statistics in files, so that another budget or saliency needs no second calibration.

    DIR/statistics.safetensors    "slots/LAYER/NAME" and "easy-ep/LAYER/NAME": sums over tokens [D, E], float64
    DIR/statistics.json           schema, domains and their tokens, and of which model and data they are

They hold sums per expert, no text. A fit takes them only for the very model and the very tokens that they were made
of; where one is unlike, it says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moestro.compress.prune.easy_ep import EasyEPSums
from moestro.data import TokenBatches
from moestro.formats.tensors import weight_files
from moestro.view.fingerprint import digest_of_data, digest_of_files, digest_of_weights
from moestro.view.observe import LayerSlots, SlotStatistics

SCHEMA = 1
NAME = "statistics"


@dataclass(frozen=True)
class Origin:
    """Of which model and data statistics are. `weights`: of a model in memory; `files`: of a checkpoint's files."""

    architecture: str
    recipe: list[Any]
    data: str
    weights: str | None
    files: str | None

    def difference(self, other: Origin) -> str | None:
        """What is unlike in `other`, in words; None where nothing is."""
        if self.architecture != other.architecture:
            return f"of another model ({self.architecture}, not {other.architecture})"
        if self.recipe != other.recipe:
            return "of the model before or after other cuts"
        pairs = [(self.weights, other.weights), (self.files, other.files)]
        known = [mine == theirs for mine, theirs in pairs if mine is not None and theirs is not None]
        if not known or not known[0]:
            return "of another model (its weights differ)"
        return None if self.data == other.data else "of other data (other texts, limits, windows or seed)"


@dataclass
class Statistics:
    """What a calibration found: {kind: result}, kinds being "slots" and "easy-ep"."""

    origin: Origin
    found: dict[str, Any] = field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write both files into the directory, which is made where it is missing."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {}
        for kind, result in self.found.items():
            layers = result.by_domain if kind == "slots" else result.layers
            about[kind] = {"domains": list(result.domains), "tokens": getattr(result, "tokens", None)}
            for layer, sums in layers.items():
                for name, value in (vars(sums) if kind == "slots" else sums).items():
                    tensors[f"{kind}/{layer}/{name}"] = value.contiguous()
        half = directory / f".{NAME}.safetensors"
        save_file(tensors, half)
        half.replace(directory / f"{NAME}.safetensors")
        (directory / f"{NAME}.json").write_text(
            json.dumps({"schema": SCHEMA, "origin": vars(self.origin), "found": about}, indent=1)
        )

    @classmethod
    def load(cls, directory: Path) -> Statistics | None:
        """Those of a directory; None where it has none. Raises ValueError where they cannot be read."""
        note, weights = directory / f"{NAME}.json", directory / f"{NAME}.safetensors"
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"stats={directory} is a file; name a directory")
        if not note.is_file() or not weights.is_file():
            return None
        try:
            about = json.loads(note.read_text())
            if about["schema"] != SCHEMA:
                raise ValueError(f"schema {about['schema']!r}, and this moestro reads {SCHEMA}")
            tables: dict[str, dict[int, dict[str, Tensor]]] = {kind: {} for kind in about["found"]}
            for key, value in load_file(weights).items():
                kind, layer, name = key.split("/")
                tables[kind].setdefault(int(layer), {})[name] = value
            found: dict[str, Any] = {}
            for kind, table in tables.items():
                domains, ordered = tuple(about["found"][kind]["domains"]), dict(sorted(table.items()))
                if kind == "slots":
                    slots = {layer: LayerSlots(**sums) for layer, sums in ordered.items()}
                    found[kind] = SlotStatistics(domains, slots, about["found"][kind]["tokens"])
                else:
                    found[kind] = EasyEPSums(domains, ordered)
            return cls(Origin(**about["origin"]), found)
        except (KeyError, TypeError, ValueError, AttributeError, OSError, SafetensorError) as e:
            raise ValueError(f"the statistics in {directory} cannot be read ({e}); delete them, or name another") from e

    def damage(self, experts: Mapping[int, int]) -> str | None:
        """What does not fit the model's layers, {layer: experts}, in words; None where all does."""
        for kind, result in self.found.items():
            layers = result.by_domain if kind == "slots" else result.layers
            if set(layers) != set(experts):
                return f"{kind} knows layers {sorted(layers)}, and the model has {sorted(experts)}"
            if kind == "slots" and set(result.tokens or ()) != set(result.domains):
                return f"{kind} has tokens of {sorted(result.tokens or ())}, and sums of {sorted(result.domains)}"
            for layer, sums in layers.items():
                shape = (len(result.domains), experts[layer])
                for name, value in (vars(sums) if kind == "slots" else sums).items():
                    if value.shape != shape or not bool(value.isfinite().all()):
                        return f"{kind} of layer {layer}: {name} is no table of {shape[0]} x {shape[1]} finite numbers"
        return None


def origin_of(view: Any, batches: TokenBatches, source: Path | None) -> Origin:
    """Of an open view and the data it is about to read. `source`: the directory it was loaded from and nothing else
    than moestro has touched since; None where that is not known."""
    path = view.path if view.streamed else source
    return Origin(
        architecture=type(view.model).__name__,
        recipe=[{"kind": op.kind, **op.to_data()} for op in view.state.recipe],
        data=digest_of_data(batches),
        weights=None if view.streamed else digest_of_weights(view.model),
        files=None if path is None else digest_of_files([path / "config.json", *weight_files(path)]),
    )
