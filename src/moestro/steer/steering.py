"""A steering setup as a small file: which edits, learned from what, for which model.

    steering = Steering.of(view, SwitchOff({(3, 7)}), learned_from="refusals.jsonl, 40 + 40 prompts")
    steering.save("no-refusals.json")
    with Steering.load("no-refusals.json").on(view) as processors:      refuses another model
        view.model.generate(..., logits_processor=processors)

The file is JSON: a person can read what is changed, and change it. It can hold a way of decoding beside the edits, or
alone: `Steering.of(view, decoding=SelfContrast(beta=0.3))`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from moestro.directories import some_path
from moestro.sets import by_layer, from_layers
from moestro.steer import self_contrast
from moestro.steer.attention_patterns import KeepRecent
from moestro.steer.reroute import rank
from moestro.steer.router_steering import HardActivate, HardSuppress, SoftSteer
from moestro.steer.soft_injection import SoftInjection
from moestro.steer.tunable_experts import Insert
from moestro.view.edit import Edit, ForceOn, Gain, LogitBias, SwitchOff
from moestro.view.heads import HeadEdit, HeadGain, HeadMask


class Fingerprint(BaseModel):
    """What tells a model from another: its shape, and a hash of its routers' weights."""

    model_config = ConfigDict(frozen=True)

    architecture: str
    experts: dict[int, int]
    """{MoE layer: number of experts}"""
    routers: str
    """SHA-256 of the router weights in bf16, so that the type a checkpoint is loaded in does not matter.

    Of a model without routers: of the first numbers of every weight."""
    heads: dict[int, int] = {}
    """{attention layer: number of heads}, where a setup edits heads"""

    @classmethod
    def of(cls, view: Any, *, heads: bool = False) -> Fingerprint:
        digest = hashlib.sha256()
        for layer in view.layers:
            for name, weight in sorted(layer.router.state_dict().items()):
                digest.update(name.encode())
                digest.update(weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
        for name, weight in () if view.layers else view.stack.named_parameters():
            digest.update(name.encode())
            digest.update(weight.detach().flatten()[:256].to("cpu", torch.bfloat16).view(torch.int16).numpy())
        sizes = {layer.index: layer.num_experts for layer in view.layers}
        name, of_heads = type(view.model).__name__, view.num_heads if heads else {}
        return cls(architecture=name, experts=sizes, routers=digest.hexdigest(), heads=of_heads)

    def difference(self, other: Fingerprint) -> str | None:
        """What sets `other` apart, in words; None where they are the same model."""
        if self.architecture != other.architecture:
            return f"it is for a {self.architecture}, and this is a {other.architecture}"
        for layer in sorted({**self.experts, **other.experts}):
            mine, theirs = self.experts.get(layer, 0), other.experts.get(layer, 0)
            if mine != theirs:
                return (
                    f"it is for {mine} experts in layer {layer}, and this model has {theirs}: experts were pruned or "
                    "merged, and the numbers of the rest have changed"
                )
        if self.heads != other.heads:
            return f"it is for heads {self.heads} by layer, and this model has {other.heads}"
        return None if self.routers == other.routers else "the router weights differ: it is for another checkpoint"


class Kind(NamedTuple):
    """How edits of one class are written to JSON and read back."""

    edit: type[Any]
    dump: Callable[[Any], dict[str, Any]]
    load: Callable[[dict[str, Any]], Any]


def _numbers(table: Mapping[int, Tensor]) -> dict[int, Any]:
    return {layer: values.detach().float().cpu().tolist() for layer, values in table.items()}


def _tensors(table: Mapping[str, Any]) -> dict[int, Tensor]:
    return {int(layer): torch.tensor(values) for layer, values in table.items()}


KINDS: dict[str, Kind] = {
    "switch_off": Kind(
        SwitchOff, lambda e: {"experts": by_layer(e.experts)}, lambda d: SwitchOff(from_layers(d["experts"]))
    ),
    "force_on": Kind(ForceOn, lambda e: {"experts": by_layer(e.experts)}, lambda d: ForceOn(from_layers(d["experts"]))),
    "insert": Kind(Insert, lambda e: {"experts": by_layer(e.experts)}, lambda d: Insert(from_layers(d["experts"]))),
    "gain": Kind(
        Gain,
        lambda e: {"gains": [[layer, i, g] for (layer, i), g in e.gains.items()], "renormalize": e.renormalize},
        lambda d: Gain({(layer, i): g for layer, i, g in d["gains"]}, renormalize=d["renormalize"]),
    ),
    "head_gain": Kind(
        HeadGain,
        lambda e: {"gains": [[layer, h, g] for (layer, h), g in e.gains.items()]},
        lambda d: HeadGain({(layer, h): g for layer, h, g in d["gains"]}),
    ),
    "head_mask": Kind(
        HeadMask,
        lambda e: {"heads": e.ids, "mode": e.mode, "means": None if e.means is None else _numbers(e.means)},
        lambda d: HeadMask(from_layers(d["heads"]), d["mode"], None if d["means"] is None else _tensors(d["means"])),
    ),
    "keep_recent": Kind(
        KeepRecent,
        lambda e: {"heads": e.ids, "window": e.window, "first": e.first},
        lambda d: KeepRecent(from_layers(d["heads"]), d["window"], d["first"]),
    ),
    "logit_bias": Kind(LogitBias, lambda e: {"bias": _numbers(e.bias)}, lambda d: LogitBias(_tensors(d["bias"]))),
    "soft_steer": Kind(
        SoftSteer,
        lambda e: {"experts": by_layer(e.experts), "strength": e.strength},
        lambda d: SoftSteer(from_layers(d["experts"]), strength=d["strength"]),
    ),
    "hard_activate": Kind(
        HardActivate,
        lambda e: {"experts": by_layer(e.experts), "seed": e.seed},
        lambda d: HardActivate(from_layers(d["experts"]), seed=d["seed"]),
    ),
    "soft_injection": Kind(
        SoftInjection,
        lambda e: {"embedding": _numbers(e.embedding), "alpha": _numbers(e.alpha)},
        lambda d: SoftInjection(_tensors(d["embedding"]), _tensors(d["alpha"])),
    ),
    "hard_suppress": Kind(
        HardSuppress,
        lambda e: {"experts": by_layer(e.experts), "seed": e.seed},
        lambda d: HardSuppress(from_layers(d["experts"]), seed=d["seed"]),
    ),
}
"""What a steering file can hold. A new kind of edit is one entry."""


class SelfContrast(BaseModel):
    """Decoding by contrast with the router's `rank`-th choice alone (see steer/self_contrast.py)."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["self_contrast"] = "self_contrast"
    rank: int = Field(self_contrast.RANK, ge=1)
    beta: float = Field(self_contrast.BETA, ge=0)
    alpha: float = Field(self_contrast.ALPHA, gt=0, le=1)

    def on(self, view: Any) -> AbstractContextManager[LogitsProcessor]:
        """The processor. Raises ValueError for a rank that the model does not have."""
        return self_contrast.self_contrast(view, rank(view, self.rank), beta=self.beta, alpha=self.alpha)


class Steering(BaseModel):
    """Edits, where they come from, and the model they are for."""

    format: int = 1
    model: Fingerprint
    edits: list[dict[str, Any]]
    """{"kind": a name in KINDS, ...}"""
    decoding: SelfContrast | None = None
    """How tokens are chosen while generating; None: as the model's user says."""
    learned_from: str = ""
    note: str = ""

    @classmethod
    def of(
        cls,
        view: Any,
        *edits: Edit | HeadEdit,
        decoding: SelfContrast | None = None,
        learned_from: str = "",
        note: str = "",
    ) -> Steering:
        """The setup of these edits on the view's model.

        Raises TypeError for an edit that no file can hold (one made of a function), ValueError for one of some rows.
        """
        written = json.loads(json.dumps([_dump(edit) for edit in edits]))  # as they are read back
        model = Fingerprint.of(view, heads=any(isinstance(edit, HeadEdit) for edit in edits))
        return cls(model=model, edits=written, decoding=decoding, learned_from=learned_from, note=note)

    def build(self) -> list[Any]:
        """The edits. Raises ValueError for a kind that this version does not know."""
        unknown = [e.get("kind") for e in self.edits if e.get("kind") not in KINDS]
        if unknown:
            raise ValueError(f"the steering file holds an edit of kind {unknown[0]!r}; known kinds are {sorted(KINDS)}")
        return [KINDS[e["kind"]].load(e) for e in self.edits]

    def check(self, view: Any) -> None:
        """Raise ValueError where the view's model is not the one that this was made for."""
        if (difference := self.model.difference(Fingerprint.of(view, heads=bool(self.model.heads)))) is not None:
            raise ValueError(f"this steering setup does not fit the model: {difference}; learn it anew on this model")

    @contextmanager
    def on(self, view: Any) -> Iterator[LogitsProcessorList]:
        """Steer the view's model inside the block; gives the logits processors that `generate` is to be called with.

        Raises ValueError for another model, before anything runs.
        """
        self.check(view)
        with view.edits(*self.build()):
            if self.decoding is None:
                yield LogitsProcessorList()
            else:
                with self.decoding.on(view) as processor:
                    yield LogitsProcessorList([processor])

    def save(self, path: str | Path) -> Path:
        """Write the file, by way of a temporary name. Raises ValueError for an empty string."""
        path = some_path(path, "path")
        half = path.with_name(path.name + ".tmp")
        half.write_text(json.dumps(self.model_dump(), indent=1) + "\n")
        half.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Steering:
        """Raises FileNotFoundError, or ValueError for a file that is no steering setup."""
        if not some_path(path, "path").is_file():
            raise FileNotFoundError(f"no steering file at {path}; `moestro steer` and `moestro studio` write them")
        try:
            return cls.model_validate_json(Path(path).read_text())
        except ValidationError as e:
            first = e.errors()[0]
            raise ValueError(f"{path} is no steering file: {'.'.join(map(str, first['loc']))}: {first['msg']}") from e


def _dump(edit: Any) -> dict[str, Any]:
    for name, kind in KINDS.items():
        if type(edit) is kind.edit:
            if edit.rows is not None:
                raise ValueError(f"{type(edit).__name__}(rows=...): no file can name rows of a batch; leave it out")
            if isinstance(getattr(edit, "at", None), Tensor):
                raise ValueError(f"{type(edit).__name__}(at=...): no file can name positions in a batch; leave it out")
            return {"kind": name, **kind.dump(edit)}
    known = sorted(kind.edit.__name__ for kind in KINDS.values())
    raise TypeError(f"{type(edit).__name__} cannot be written to a steering file; it holds {known}")
