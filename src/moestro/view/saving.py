"""Write what a view holds as a checkpoint that others read: planned whole, written tensor by tensor, checked, moved.

The same for a model in memory and a streamed one; they differ in where the tensors come from (`view._parts`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from moestro.directories import complete_directory
from moestro.formats import hf
from moestro.formats.card import CARD, LICENCE, NOTES, base_model, front_matter, write_card
from moestro.formats.companions import same_generation, write_companions
from moestro.formats.quantised import activation_scales
from moestro.formats.source import Source, quantisation_of, stated_in
from moestro.formats.stated_config import changed_numbers, part_for, read_config, stated_config
from moestro.formats.tensors import SHARD_BYTES, Writer, header, weight_files
from moestro.formats.unread import Unread, in_words, sort_unread, state_no_predictors
from moestro.view.checkpoint import plain_config, saved_bytes, source_directories
from moestro.view.experts import experts_of
from moestro.view.router_axes import router_tensors
from moestro.view.surgery import EXPERT_COUNT, TOP_K

FORMATS = {
    "hf": "plain tensors, in the model's own type",
    "source": "quantised as the checkpoint that the model was loaded from",
}
"""{name of a format: what it is}"""


@dataclass(frozen=True)
class Draft:
    """What a save will write, known before anything is written."""

    format: str
    source: Source | None
    config: Any
    """In force while tensors are converted."""
    stated: Mapping[str, Any]
    layout: Mapping[str, Tensor]
    """{stored name: a tensor of its type and shape on the meta device}"""
    unread: Unread
    requantised: bool
    told: list[str]
    """What was left out, in words."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.layout.values())


def save(view: Any, path: str | Path, *, format: str, overwrite: bool, shard_bytes: int = SHARD_BYTES) -> Path:
    """See `ExpertView.save`."""
    plan = draft(view, format)
    apart = [view.state.source] if view.state.source is not None else source_directories(view.model)
    with complete_directory(path, overwrite=overwrite, size=plan.nbytes, apart_from=apart) as half:
        write(view, plan, half, shard_bytes=shard_bytes)
    return Path(path)


def draft(view: Any, format: str = "hf") -> Draft:
    """Plan a save. Raises ValueError where the model, or the format, cannot be written; says why and what can be."""
    source = view.source
    check_format(format, source)
    config = plain_config(view.model, view.stack, view.layers)
    config.dtype = str(view.model.dtype).removeprefix("torch.")
    config.architectures = [type(view.model).__name__]
    generation = _generation_config(view)
    if generation is not None and not (source is not None and same_generation(source.path, generation)):
        generation.validate(strict=True)  # transformers refuses to write one that contradicts itself
    stated, opened = _stated_by(source, config)
    unread = _unread(view, source, cut=_is_cut(config, opened))
    told = [f"left out, because {why}: {in_words(names)}" for why, names in unread.left_out.items()]
    predicts = any("mtp" in name or "nextn" in name for name in view.model.state_dict())
    changed = [] if unread.predictors or predicts else state_no_predictors(config)
    if changed and any("next-token" in why for why in unread.left_out):
        told = [f"{line}; the saved config states {changed[0]}=0" for line in told]
    written = stated_config(config, stated, opened, counts=(EXPERT_COUNT, TOP_K))
    requantised = format == "source" and source is not None and source.quantisation is not None
    if requantised:
        assert source is not None
        written["quantization_config"] = source.quantisation
    with configured(view.model, config):
        layout = _layout(view, source if requantised else None)
    layout |= _carried_layout(unread, source, raw=requantised)
    return Draft(format, source, config, written, layout, unread, requantised, told)


def _generation_config(view: Any) -> Any:
    return view.model.generation_config if view.model.can_generate() else None


def check_format(format: str, source: Source | None) -> None:
    """Raise ValueError for an unknown format, or one in which this model cannot be written."""
    if format not in FORMATS:
        known = "; ".join(f"{name} ({what})" for name, what in FORMATS.items())
        raise ValueError(f"format={format!r} is not known; there are {known}")
    if format == "source" and source is None:
        raise ValueError(
            'format="source": this model came from no checkpoint directory, so there is no format of its own; '
            'save it with format="hf"'
        )
    if format == "source" and source is not None and (fixed := activation_scales(source.stored)):
        raise ValueError(
            f'format="source": {source.path} holds scales that were calibrated for activations ({fixed[0]} for one), '
            'which cannot be made again for other experts; save it with format="hf"'
        )


def _stated_by(source: Source | None, config: Any) -> tuple[dict[str, Any] | None, Any]:
    """(what the source states for a model of this config, the config that transformers reads from it)"""
    stated = part_for(config, source.stated) if source is not None else None
    return stated, read_config(type(config), stated) if stated is not None else None


def _is_cut(config: Any, opened: Any) -> bool:
    """Whether the number of experts is another than in the source."""
    if opened is None:
        return False
    numbers = changed_numbers(opened, config, [EXPERT_COUNT])[0]
    return any(old != new for old, new in numbers.items()) or bool(config.get_text_config().is_heterogeneous)


def _unread(view: Any, source: Source | None, *, cut: bool) -> Unread:
    """What becomes of the source's tensors that the model does not have."""
    if source is None or not source.stored:
        return Unread()
    groups, names = hf.reading_plan(view.model, source.plain)
    read = {target for group in groups for target in group.targets}
    if hf.saved_names(view.model) - read - set(view.model.all_tied_weights_keys):
        return Unread()  # another model lies there by now
    same = type(view.model).__name__ in (source.stated.get("architectures") or [type(view.model).__name__])
    return sort_unread(names, source.stated, cut=cut, same_family=same)


def _layout(view: Any, source: Source | None) -> dict[str, Tensor]:
    """Names, types and shapes of what will be stored; quantised as `source`, where one is given."""
    layout: dict[str, Tensor] = {}
    for part in view._parts(hf.saved_names(view.model), meta=True):
        layout |= hf.to_stored(view.model, part)
    return layout if source is None else _requantised_layout(layout, source)


def _requantised_layout(layout: Mapping[str, Tensor], source: Source) -> dict[str, Tensor]:
    return {n: t for name, tensor in layout.items() for n, t in source.requantiser.layout(name, tensor).items()}


def _carried_layout(unread: Unread, source: Source | None, *, raw: bool) -> dict[str, Tensor]:
    if source is None:
        return {}
    parts = {n: t for name in unread.carried for n, t in source.parts_of(name, raw=raw).items()}
    return {name: torch.empty(part.shape, dtype=part.dtype, device="meta") for name, part in parts.items()}


@contextmanager
def configured(model: Any, config: Any) -> Iterator[None]:
    """With `config` as the model's."""
    former, model.config = model.config, config
    try:
        yield
    finally:
        model.config = former


# Sizes


def size_in(view: Any, format: str, *, cut: bool = False) -> int:
    """Bytes of the weights in a checkpoint of this format. `cut`: without what a cut of the experts will leave out."""
    if not isinstance(view.model, PreTrainedModel):
        return saved_bytes(view.model)
    source = view.source
    requantised = format == "source" and source is not None and source.quantisation is not None
    if requantised:
        size = sum(tensor.nbytes for tensor in _layout(view, source).values())
    else:
        state = view.model.state_dict()
        size = sum(state[name].nbytes for name in hf.saved_names(view.model))
    _, opened = _stated_by(source, view.model.config)
    unread = _unread(view, source, cut=cut or _is_cut(view.model.config, opened))
    return size + sum(tensor.nbytes for tensor in _carried_layout(unread, source, raw=requantised).values())


def expert_sizes(view: Any, format: str) -> dict[int, int]:
    """{layer: bytes of one expert in a checkpoint of this format, its rows of the router included}"""
    source = view.source
    requantised = format == "source" and source is not None and source.quantisation is not None
    names = {id(module): name for name, module in view.model.named_modules()}
    sizes = {}
    for layer in view.layers:
        part = {}
        for held in _per_expert(layer):
            tensor = held.tensor
            part[f"{names[id(held.owner)]}.{held.name}"] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if requantised:
            part = _requantised_layout(hf.to_stored(view.model, part), source)
        sizes[layer.index] = sum(tensor.nbytes for tensor in part.values()) // layer.num_experts
    return sizes


def _per_expert(layer: Any) -> list[Any]:
    if layer.rule is None:
        return []
    experts = experts_of(layer.experts)
    return [*(experts.per_expert() if hasattr(experts, "per_expert") else ()), *router_tensors(layer)]


# Writing


def write(view: Any, plan: Draft, directory: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write what was planned into an existing, empty directory, and check it. Warns of what is left out.

    Raises RuntimeError where what was written is not what the family's class reads.
    """
    for told in plan.told:
        warnings.warn(told, stacklevel=3)
    text = json.dumps(plan.stated, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    beside = plan.source.path if plan.source is not None else None
    write_companions(directory, beside, view.tokenizer, _generation_config(view))
    (directory / NOTES).write_text(json.dumps(_notes(view, plan), indent=1), encoding="utf-8")
    write_card(directory)
    writer = Writer(directory, plan.layout, shard_bytes=shard_bytes)
    try:
        with torch.no_grad():
            for part in view._parts(hf.saved_names(view.model)):
                with configured(view.model, plan.config):
                    stored = hf.to_stored(view.model, part)
                for name in list(stored):
                    _write_one(writer, plan, name, stored.pop(name))
                del part
            _write_carried(writer, plan)
        writer.finish()
    finally:
        writer.close()
    _check(view, plan, directory)


def _write_one(writer: Writer, plan: Draft, name: str, tensor: Tensor) -> None:
    if not plan.requantised:
        writer.write(name, tensor)
        return
    assert plan.source is not None
    for part, value in plan.source.requantiser.encode(name, tensor).items():
        writer.write(part, value)


def _write_carried(writer: Writer, plan: Draft) -> None:
    for name in plan.unread.carried:
        assert plan.source is not None
        for part, stored in plan.source.parts_of(name, raw=plan.requantised).items():
            writer.write(part, stored[...])


def _notes(view: Any, plan: Draft) -> dict[str, Any]:
    """moestro.json: plain data about how the checkpoint came to be."""
    path = plan.source.path if plan.source is not None else None
    name = str(getattr(view.model.config, "_name_or_path", "") or "")
    card = front_matter(path / CARD) if path is not None else {}
    state = view.state
    begun = state.made_on.experts if state.recipe else {}
    return {
        "format": plan.format,
        "class": type(view.model).__name__,
        "stored": _stored_as(plan),
        "source": {
            "name": path.name if path is not None and Path(name).exists() else name or type(view.model).__name__,
            "base_model": base_model(str(path or name), path),
            "card": {key: card[key] for key in LICENCE if key in card},
        },
        "experts": {
            str(key): [layer.num_experts, begun.get(layer.path, layer.num_experts)]
            for key, layer in view.by_key.items()
        },
        "left_out": plan.told,
        "carried": [in_words(plan.unread.carried)] if plan.unread.carried else [],
        "transformers": transformers.__version__,
        **view.notes(),
    }


def _stored_as(plan: Draft) -> str:
    if plan.requantised:
        return f"weights quantised with {plan.stated['quantization_config'].get('quant_method')}"
    return f"weights in {plan.stated.get('dtype', 'their own type')}"


def _check(view: Any, plan: Draft, directory: Path) -> None:
    """Let transformers' own reading go over the headers of what was written."""
    if quantisation_of(stated_in(directory)) is not None:
        plain: Mapping[str, Any] = Source(directory).plain
    else:
        plain = {}
        for file in weight_files(directory):
            with file.open("rb") as stream:
                plain |= dict(header(file, stream.fileno()))
    config = type(view.model.config).from_pretrained(directory)
    tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in plain.items()}
    hf.check_read(type(view.model), config, tensors, plan.unread.carried, directory)


def meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same names, types and shapes on the meta device."""
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
