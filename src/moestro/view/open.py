"""`moestro.open`: a model whose experts can be observed, edited, cut and saved."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

import moestro.recipe as recipes
import moestro.view.operations as operations
import moestro.view.saving as saving
import moestro.view.surgery as surgery
from moestro.bundled import bundled_path
from moestro.directories import some_path
from moestro.formats.source import Source, directory_of
from moestro.formats.stated_config import part_for
from moestro.recipe import Notes, Recipe
from moestro.view.edit import Edit
from moestro.view.events import Batch
from moestro.view.heads import AnyObserver, HeadEdit, HeadLayer
from moestro.view.in_force import InForce
from moestro.view.layers import LayerKey, MoELayer, decoder_of, find_layers, load, stack_of
from moestro.view.lm_logits import logits_observers
from moestro.view.observe import as_batch, observe
from moestro.view.obstacles import check_no_adapters
from moestro.view.router_axes import warn_of_rows
from moestro.view.situation import find_layer
from moestro.view.state import ModelState, state_of
from moestro.view.taps import taps_of


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

    @property
    def state(self) -> ModelState:
        """What all views of this model share."""
        return state_of(self.stack)

    @property
    def _force(self) -> InForce:
        return taps_of(self.stack).force

    @property
    def by_key(self) -> dict[LayerKey, MoELayer]:
        """The MoE layers by what edits, observers and recipes call them: numbers, or names where numbers repeat."""
        numbers = [layer.index for layer in self.layers]
        unique = len(set(numbers)) == len(numbers)
        return {layer.index if unique else layer.name: layer for layer in self.layers}

    def __repr__(self) -> str:
        return "\n".join([f"HeadView of {type(self.model).__name__}:", *(f"  {layer}" for layer in self.heads)])

    @property
    def heads(self) -> list[HeadLayer]:
        """The attention layers whose heads can be observed and edited, verified when first asked for.

        Raises ValueError where the model does not use transformers' attention interface.
        """
        return self._force.heads.layers

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
        return observe(
            self.model,
            self.stack,
            self._force,
            self.by_key,
            data,
            observers,
            progress=progress,
            description=description,
        )

    @contextmanager
    def observing(self, *observers: AnyObserver) -> Iterator[None]:
        """Observe whatever runs inside the block, `generate` included; samples are rows of the batch."""
        if logits_observers(observers):
            raise ValueError("lm_logits are handed out by view.observe(data, observers) alone")
        with self._force.observing(observers, self.by_key):
            yield

    @property
    def batch(self) -> Batch | None:
        """For hooks of one's own inside `observe`: the batch that the model reads, with its tokens and padding."""
        return self._force.batch

    @contextmanager
    def reading(self, batch: Any) -> Iterator[None]:
        """Tell observers where the tokens of the forward pass inside the block come from: `batch`, a token batch."""
        with self._force.on_batch(as_batch(batch)[0]):
            yield

    @contextmanager
    def edits(self, *edits: Edit | HeadEdit) -> Iterator[None]:
        """Run edits inside the block, after those already active. Gone afterwards, also after an exception.

        Blocks may overlap and end in any order, in any thread: what is in force belongs to the model. A layer that
        gradient checkpointing runs again is edited as it was the first time.

        Raises ValueError before anything runs where an edit does not fit the model.
        """
        with self._force.editing(edits, self.by_key, self.model):
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
        prefix = next(n for n, m in model.named_modules() if m is self.stack)
        for layer in layers:
            layer.path = layer.name.removeprefix(f"{prefix}." if prefix else "")
        self.load_seconds: float | None = None
        """What loading the model took; None for a model that came from memory."""
        warn_of_rows(self.layers)

    def __repr__(self) -> str:
        return "\n".join([f"ExpertView of {type(self.model).__name__}:", *(f"  {layer}" for layer in self.layers)])

    def layer(self, key: LayerKey) -> MoELayer:
        """The MoE layer in decoder layer `key`, or of that name. Raises ValueError where there is none, or several."""
        return find_layer(self.by_key, key)

    @property
    def original_ids(self) -> dict[LayerKey, list[int]]:
        """{layer: for each present expert, its number in the first model of the lineage: before all cuts}"""
        ids = operations.original_ids(self)
        return {key: ids[layer.name] for key, layer in self.by_key.items()}

    # Surgery: the weights change

    def check(self, recipe: Recipe, format: str | None = "hf") -> None:
        """Refuse what cannot be done before any work: nothing is changed, observed or written.

        Everything that surgery and `save` would say is asked, on a copy of the model without weights. `format`: of the
        checkpoint that is to be saved; None where the model stays in memory.

        Raises ValueError: the recipe was made on a model that is not alike, an operation cannot be done (unknown or
        too few experts, grouped routers, layers that look experts up by token id, shared, adapted, packed or offloaded
        tensors), or the format cannot hold the result.
        """
        operations.check(self, recipe, format)

    @surgery.uninterrupted()
    def apply(self, recipe: Recipe) -> None:
        """Do what the recipe says for good, all of it or nothing.

        Raises ValueError as `check` does; RuntimeError while edits or observations are under way, or where a cut
        router does not give the logits that it should.
        """
        with self.state.lock:
            self.check_idle()
            operations.apply(self, recipe)

    def bytes_after(self, recipe: Recipe, format: str = "hf") -> int:
        """Size of the weights in the checkpoint that `save(format=...)` would write after the recipe.

        Raises ValueError for layers that the model does not have.
        """
        return operations.bytes_after(self, recipe, format)

    def keep_experts(self, keep: surgery.Keep) -> None:
        """Drop all experts but {layer: [ids]}. See `surgery.keep_experts`."""
        self.apply(Recipe((recipes.keep(keep),)))

    def merge_experts(
        self,
        clusters: Mapping[Any, Any],
        weights: Mapping[Any, Any] | None = None,
    ) -> None:
        """Make each cluster of experts one: {layer: [[ids], ...]}. See `surgery.merge_experts`."""
        self.apply(Recipe((recipes.merge(clusters, weights),)))

    def replace_experts(self, layer: int, module: nn.Module) -> None:
        """Put another module in the place of a layer's experts. See `surgery.replace_experts`."""
        self.check_idle()
        surgery.replace_experts(self.layer(layer), module)

    def set_top_k(self, top_k: int) -> None:
        """Let every token use `top_k` experts in all layers. See `surgery.set_top_k`."""
        self.apply(Recipe((recipes.set_top_k(top_k),)))

    def check_idle(self) -> None:
        """Raise RuntimeError while edits or observations are under way: the weights cannot be changed then."""
        if self._force.active:
            raise RuntimeError("weights cannot be changed while they are in use: end the edits and observations first")

    @property
    def source(self) -> Source | None:
        """The checkpoint directory that the model came from, as it lies there now; None where there is none."""
        if not isinstance(self.model, PreTrainedModel):
            return None
        name = self.state.source or self.model.config._name_or_path
        path = directory_of(name) if name else None
        if path is None:
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
            ValueError: the model cannot be stored as such a checkpoint; says why and what can be done. Or `path` is,
                lies in or holds the directory that the model was loaded from.
            FileExistsError: the directory is there and `overwrite` is off, or holds files that moestro did not write.
            BlockingIOError: another run is writing there.
            OSError: the disk cannot hold it. Nothing is left behind.
        """
        check_no_adapters(self.model)
        return saving.save(self, path, format=format, overwrite=overwrite)

    def write(self, directory: Path, *, format: str = "hf") -> None:
        """Write the checkpoint that `save` writes into a directory that is there and empty."""
        saving.write(self, saving.draft(self, format), directory)

    def notes(self) -> dict[str, Any]:
        """What goes to moestro.json beside a saved checkpoint, as plain data."""
        return operations.notes(self).to_data()

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
    stack to open where a model has several ("vision_moe", say); "all" opens them together, layers that number alike are
    then called by their names. `stream=True` opens a directory layer by layer, for
    models larger than memory. `load_options` go to `from_pretrained` (dtype, device_map, ...).

    Raises:
        ValueError: an empty string, a dense model, remote code, or a router that no routing rule reproduces (with the
            layer's name and the measured difference).
        FileNotFoundError: an incomplete checkpoint.
    """
    if isinstance(model, str | Path) and not some_path(model, "model").exists():
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
        operations.remember(view, Notes.read(source))
    return view
