"""`moestro.open`: a model whose experts can be observed, edited, cut and saved."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.integrations.accelerate import load_offloaded_parameter

import moestro.view.saving as saving
import moestro.view.surgery as surgery
from moestro.bundled import bundled_path
from moestro.formats.source import Source
from moestro.formats.stated_config import part_for
from moestro.view.edit import Edit
from moestro.view.events import Batch
from moestro.view.heads import AnyObserver, HeadEdit, HeadLayer
from moestro.view.layers import MoELayer, decoder_of, find_layers, load, stack_of
from moestro.view.lm_logits import logits_observers
from moestro.view.observe import as_batch, observe
from moestro.view.state import state_of
from moestro.view.taps import Taps


class HeadView:
    """A model seen through its attention heads: for dense models, which have no experts.

    The model itself stays an ordinary transformers model (`view.model`).
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, stack: nn.Module | None = None):
        self.model: Any = model
        self.tokenizer = tokenizer
        self.layers: list[MoELayer] = []
        self.stack: Any = stack if stack is not None else decoder_of(model)
        """The sub-model that runs from token ids to hidden states."""
        self.state = state_of(self.stack)
        """What all views of this model share."""
        self._taps = Taps([], self.stack)

    def __repr__(self) -> str:
        return "\n".join([f"HeadView of {type(self.model).__name__}:", *(f"  {layer}" for layer in self.heads)])

    @property
    def heads(self) -> list[HeadLayer]:
        """The attention layers whose heads can be observed and edited, verified when first asked for.

        Raises ValueError where the model does not use transformers' attention interface.
        """
        return self._taps.heads.layers

    @property
    def num_heads(self) -> dict[int, int]:
        """{decoder layer: number of query heads}"""
        return {layer.index: layer.num_heads for layer in self.heads}

    def observe(
        self,
        data: Iterable[Any],
        observers: Sequence[AnyObserver],
        *,
        progress: bool = True,
        description: str = "observing",
    ) -> list[Any]:
        """Run the model once over `data` for all observers; returns their results in order. See `observe.observe`."""
        return observe(self.model, self.stack, self._taps, data, observers, progress=progress, description=description)

    @contextmanager
    def observing(self, *observers: AnyObserver) -> Iterator[None]:
        """Observe whatever runs inside the block, `generate` included; samples are rows of the batch."""
        if logits_observers(observers):
            raise ValueError("lm_logits are handed out by view.observe(data, observers) alone")
        with self._taps.observing(observers):
            yield

    @property
    def batch(self) -> Batch | None:
        """For hooks of one's own inside `observe`: the batch that the model reads, with its tokens and padding."""
        return self._taps.batch

    @contextmanager
    def reading(self, batch: Any) -> Iterator[None]:
        """Tell observers where the tokens of the forward pass inside the block come from: `batch`, a token batch."""
        with self._taps.on_batch(as_batch(batch)[0]):
            yield

    @contextmanager
    def edits(self, *edits: Edit | HeadEdit) -> Iterator[None]:
        """Run edits inside the block. They nest, and are gone afterwards, also after an exception.

        Raises ValueError before anything runs where an edit does not fit the model.
        """
        with self._taps.editing(edits):
            yield

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.stack.parameters()).device


class ExpertView(HeadView):
    """A model seen through its experts, and its heads."""

    streamed = False
    """Whether the weights stay on disk (see `StreamView`)."""

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, part: str | None = None):
        layers = find_layers(model, part)
        super().__init__(model, tokenizer, stack=stack_of(model, layers))
        self.layers = layers
        self.original_ids: dict[int, list[int]] = {layer.index: list(range(layer.num_experts)) for layer in self.layers}
        """{layer: for each present expert, its number when the model was opened}"""
        self.load_seconds: float | None = None
        """What loading the model took; None for a model that came from memory."""
        self._taps = Taps(self.layers, self.stack)
        self._stated = self.layers[0].num_experts

    def __repr__(self) -> str:
        return "\n".join([f"ExpertView of {type(self.model).__name__}:", *(f"  {layer}" for layer in self.layers)])

    def layer(self, index: int) -> MoELayer:
        """The MoE layer in decoder layer `index`."""
        for layer in self.layers:
            if layer.index == index:
                return layer
        raise ValueError(f"decoder layer {index} has no experts; MoE layers are {[*self.original_ids]}")

    # Surgery: the weights change

    @surgery.uninterrupted()
    def keep_experts(self, keep: surgery.Keep) -> None:
        """Drop all experts but {layer: [ids]}. See `surgery.keep_experts`."""
        self._check_idle()
        surgery.check_unshared(self.model, self.layers)
        surgery.keep_experts(self.layers, keep)
        for index, ids in keep.items():
            self.original_ids[index] = [self.original_ids[index][e] for e in ids]
        self._state_counts()

    @surgery.uninterrupted()
    def merge_experts(
        self,
        clusters: Mapping[int, Sequence[Sequence[int]]],
        weights: Mapping[int, Float[Tensor, " e"]] | None = None,
    ) -> None:
        """Make each cluster of experts one: {layer: [[ids], ...]}. See `surgery.merge_experts`."""
        self._check_idle()
        surgery.check_unshared(self.model, self.layers)
        surgery.merge_experts(self.layers, clusters, weights)
        for index, groups in clusters.items():
            self.original_ids[index] = [self.original_ids[index][min(group)] for group in groups]
        self._state_counts()

    def replace_experts(self, layer: int, module: nn.Module) -> None:
        """Put another module in the place of a layer's experts. See `surgery.replace_experts`."""
        self._check_idle()
        surgery.replace_experts(self.layer(layer), module)

    def set_top_k(self, top_k: int) -> None:
        """Let every token use `top_k` experts in all layers. See `surgery.set_top_k`."""
        self._check_idle()
        surgery.set_top_k(self.layers, self._holders(), top_k)

    def _check_idle(self) -> None:
        if self._taps.active:
            raise RuntimeError("weights cannot be changed while they are in use: end the edits and observations first")

    def _holders(self) -> list[Any]:
        """Configs and models that state numbers of experts for all layers."""
        holders = [self.model, self.stack, self.stack.config, *(layer.experts.config for layer in self.layers)]
        return list({id(h): h for h in holders}.values())

    def _state_counts(self) -> None:
        """Bring configs and models in line with the layers, where all layers agree."""
        counts = {layer.num_experts for layer in self.layers}
        if len(counts) == 1:
            (count,) = counts
            surgery.set_expert_count(self._holders(), self._stated, count)
            self._stated = count

    @property
    def source(self) -> Source | None:
        """The checkpoint directory that the model came from, as it lies there now; None where there is none."""
        loaded_from = getattr(getattr(self.model, "config", None), "_name_or_path", "")
        path = self.state.source or (Path(loaded_from) if loaded_from else None)
        if path is None or not (path / "config.json").is_file():
            return None
        found = Source(path, self.model.dtype, strict=False)
        return found if part_for(self.model.config, found.stated) is not None else None

    @property
    def num_bytes(self) -> int:
        """Size of the weights in a checkpoint of the kind that the model came from: quantised, if that was."""
        return saving.size_in(self, "source")

    def bytes_in(self, format: str, *, cut: bool = False) -> int:
        """Size of the weights in the checkpoint that `save(format=...)` would write.

        `cut`: once experts were removed, without what cannot be cut with them (next-token-prediction layers).
        """
        return saving.size_in(self, format, cut=cut)

    def expert_bytes(self, format: str) -> dict[int, int]:
        """{layer: size of one expert} in the checkpoint that `save(format=...)` would write."""
        return saving.expert_sizes(self, format)

    def save(self, path: str | Path, *, format: str = "hf", overwrite: bool = False) -> Path:
        """Write a Hugging Face checkpoint to directory `path`, with tokenizer, templates, licence and a model card.

        format: "hf" for plain tensors, or "source" to quantise as the checkpoint did that the model came from: what was
            not changed keeps its very bytes.

        Raises:
            ValueError: the model cannot be stored as such a checkpoint; says why and what can be done.
            FileExistsError: the directory is there and `overwrite` is off.
            OSError: the disk cannot hold it. Nothing is left behind.
        """
        return saving.save(self, path, format=format, overwrite=overwrite)

    def write(self, directory: Path, *, format: str = "hf") -> None:
        """Write the checkpoint that `save` writes into a directory that is there and empty."""
        saving.write(self, saving.draft(self, format), directory)

    def notes(self) -> dict[str, Any]:
        """What goes to moestro.json beside a saved checkpoint, as plain data."""
        return {"original_experts": {str(i): list(ids) for i, ids in self.original_ids.items()}}

    def _parts(self, names: Collection[str], *, meta: bool = False) -> Iterator[dict[str, Tensor]]:
        """The model's tensors of these names, a numbered layer at a time: what is converted together stays together."""
        state = self.model.state_dict()
        parts: dict[str, list[str]] = {}
        for name in state:
            if name in names:
                number = re.match(r"(?:[^.]*[^.\d][^.]*\.)*?\d+\.", name)
                parts.setdefault(number.group(0) if number else "", []).append(name)
        for part in parts.values():
            if meta:
                yield saving.meta({name: state[name] for name in part})
            else:
                yield {name: self._at_hand(name, state[name]) for name in part}

    def _at_hand(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor itself, fetched where accelerate keeps it elsewhere."""
        if tensor.device.type == "meta" and getattr(self.model, "hf_device_map", None):
            tensor = load_offloaded_parameter(self.model, name)
        return tensor.detach()


def open(
    model: nn.Module | str | Path,
    *,
    tokenizer: Any = None,
    part: str | None = None,
    experts: bool = True,
    stream: bool = False,
    **load_options: Any,
) -> Any:
    """Open a mixture-of-experts model: a transformers model, a checkpoint directory, or a name on the hub.

    `experts=False` opens any model, a dense one too, for its attention heads alone (a `HeadView`). `part`: which expert
    stack to open where a model has several ("vision_moe", say). `stream=True` opens a directory layer by layer, for
    models larger than memory. `load_options` go to `from_pretrained` (dtype, device_map, ...).

    Raises:
        ValueError: a dense model, remote code, or a router that no routing rule reproduces (with the layer's name and
            the measured difference).
        FileNotFoundError: an incomplete checkpoint.
    """
    if isinstance(model, str | Path) and not Path(model).exists():
        model = bundled_path(str(model)) or model
    if stream:
        from moestro.view.stream import StreamView

        if isinstance(model, nn.Module):
            raise ValueError("stream=True opens a checkpoint directory; this model is in memory already")
        return StreamView(model, tokenizer=tokenizer, part=part, **load_options)
    source = Path(model) if isinstance(model, str | Path) and Path(model).is_dir() else None
    if isinstance(model, str | Path):
        model, found, seconds = load(model, **load_options)
        tokenizer = found if tokenizer is None else tokenizer
    elif load_options:
        raise TypeError(f"{sorted(load_options)} apply to a path; this model is loaded already")
    else:
        seconds = None
    if not experts:
        return HeadView(model, tokenizer)
    view = ExpertView(model, tokenizer, part=part)
    view.load_seconds = seconds
    if source is not None:
        view.state.source = source.absolute()
    return view
