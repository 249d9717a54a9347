"""`moestro.open(path, stream=True)`: models larger than memory, decoder layer by decoder layer.

The model is a skeleton on the meta device; only its routers, which are small, stay in memory. To observe, the first
decoder layer is loaded and sees all batches, what it hands on is kept, and so on with the next. Each layer runs inside
the family's own forward: the layers before it play back what they handed on, the ones behind it pass it through, so
masks, positions and whatever else a family gives its layers come from the family's code. To save, each layer is
loaded, cut as planned, converted to the checkpoint's own form and written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import moestro.view.operations as operations
import moestro.view.saving as saving
from moestro.formats.hf import Group
from moestro.formats.source import Source
from moestro.formats.tensors import SHARD_BYTES, check_complete
from moestro.recipe import Notes, Recipe
from moestro.view.fingerprint import digest_of_data, observer_key
from moestro.view.heads import AnyObserver
from moestro.view.in_force import HEAD_NEEDS
from moestro.view.layers import adopt_generation_config, load_tokenizer
from moestro.view.lm_logits import hand_logits, language_model, logits_observers
from moestro.view.observe import _merged, _rank_and_world, as_batch, progress_bar
from moestro.view.open import ExpertView
from moestro.view.stream_parts import Ahead, State, list_of, router_names
from moestro.view.stream_walk import Hidden, Progress, Walk
from moestro.view.stream_weights import Weights

HIDDEN_BYTES = 2**30
"""Hidden states of the calibration set are kept in memory up to this size, beyond it in files."""


class StreamView(ExpertView):
    """An ExpertView whose weights stay on disk. `observe`, surgery by recipes or methods, and `save` work as in memory;
    `view.model` holds no weights but the routers', so it cannot be called itself.

    `path`: a checkpoint directory, plain or quantised (then dequantised layer by layer). `dtype`,
    `attn_implementation` and `experts_implementation` as for `from_pretrained`; `device`: where layers are computed,
    one at a time.

    Raises:
        FileNotFoundError, ValueError: an incomplete checkpoint, one that is quantised in a way that is not read, or a
            model that ExpertView refuses.
    """

    streamed = True

    def __init__(
        self,
        path: str | Path,
        tokenizer: Any = None,
        *,
        part: str | None = None,
        dtype: Any = "auto",
        device: str = "cpu",
        attn_implementation: str | None = None,
        experts_implementation: str | None = None,
    ):
        from transformers import AutoConfig

        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"stream=True opens a checkpoint directory; there is none at {path}")
        check_complete(self.path)
        config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        if experts_implementation is not None:
            config._experts_implementation = experts_implementation
        self._options: dict[str, Any] = dict(
            part=part,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            experts_implementation=experts_implementation,
        )
        self._weights = Weights(self.path, config, dtype=dtype, device=device)
        model = self._weights.model
        adopt_generation_config(model, self.path)
        with torch.no_grad():
            self._weights.load(self._weights.under(*router_names(model)))
            super().__init__(model, tokenizer if tokenizer is not None else load_tokenizer(self.path), part=part)
        self._list_name = list_of(self.layers)
        self._decoder = list(model.get_submodule(self._list_name))
        self._as_opened = [State(module, self._holders_in(i)) for i, module in enumerate(self._decoder)]
        operations.remember(self, Notes.read(self.path))

    def __reduce__(self) -> Any:
        return _opened_again, (self.path, self.tokenizer, self._options, operations.notes(self).recipe)

    @property
    def source(self) -> Source:
        """The checkpoint directory that is streamed."""
        return self._weights.source

    @property
    def original_bytes(self) -> int:
        """Size of the weights in the checkpoint on disk; `num_bytes` is that of the one to be saved."""
        return self.source.nbytes

    @property
    def device(self) -> torch.device:
        """Where layers are computed."""
        return torch.device(self._weights.device)

    # Surgery: `apply` changes the skeleton, which checks it; the weights follow whenever a layer is loaded (`_loaded`)

    def replace_experts(self, layer: int, module: nn.Module) -> None:
        raise ValueError("a streamed model's experts cannot be replaced by a module: open it with stream=False")

    def observing(self, *observers: AnyObserver) -> Any:
        raise ValueError("a streamed model cannot be called; give the data to view.observe(data, observers)")

    # Observe

    def observe(
        self,
        data: Iterable[Any],
        observers: Sequence[AnyObserver],
        *,
        progress: bool = True,
        description: str = "observing",
        work: str | Path | None = None,
        hidden_bytes: int = HIDDEN_BYTES,
    ) -> list[Any]:
        """Run the model over `data` for all observers, layer by layer; returns their results in order.

        Arguments and results are those of `ExpertView.observe`, bit for bit in the same dtype; events come layer by
        layer instead of batch by batch. Layers behind the last MoE layer are run only where an observer needs
        "lm_logits", which are handed out batch by batch in the last layer.

        work: a directory in which to keep the hidden states and the observers after every layer. A run that was cut
            off goes on with the next layer when it is started again with the same arguments. Delete it when done.
        hidden_bytes: hidden states larger than this are kept in files.

        Raises:
            ValueError: no batch holds a token, an observer asks for an unknown need or for the logits of a model
                without a language head, `work` belongs to another observation (says what differs), or an observer
                cannot be pickled into it.
            FloatingPointError: NaN router logits; names the layer and the sample.
        """
        if any(o.needs & HEAD_NEEDS for o in observers):
            raise ValueError("a streamed model's heads cannot be observed: open it with stream=False")
        rank, world = _rank_and_world()
        batches = data if hasattr(data, "__len__") and hasattr(data, "__getitem__") else list(data)
        observers, failure = list(observers), None
        shown = description if progress and rank == 0 else None
        try:
            self._observe(batches, observers, rank, world, shown, work, hidden_bytes)
        except Exception as e:
            if world == 1:
                raise
            failure = e  # the other processes wait for ours
        merged = observers if world == 1 else _merged(observers, failure, rank, world)
        return [o.result() for o in merged]

    def _observe(
        self,
        batches: Any,
        observers: list[AnyObserver],
        rank: int,
        world: int,
        description: str | None,
        work: str | Path | None,
        hidden_bytes: int,
    ) -> None:
        """This process' share: every `world`-th batch, with `rank` the first. `description`: of the progress bar."""
        mine, samples, seen = [], 0, 0
        for number in range(len(batches)):
            batch, _ = as_batch(batches[number], samples)
            if number % world == rank and len(batch.tokens):
                mine.append((number, samples))
            samples, seen = samples + batch.shape[0], seen + len(batch.tokens)
        if not seen:
            raise ValueError("the data holds no token to observe: every batch is empty or padding")
        readers = logits_observers(observers)
        model = language_model(self.model, self.stack) if readers else self.stack
        last = len(self._decoder) - 1 if readers else max(layer.index for layer in self.layers)
        device = self._weights.device
        with ExitStack() as undo:
            bar = undo.enter_context(progress_bar(description is not None))
            stage: Progress | None = None
            if work is None:
                directory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="moestro-hidden-")))
            else:
                directory = Path(work) / f"rank{rank}" if world > 1 else Path(work)
                stage = Progress(directory, self._fingerprint(batches, observers))
            hidden = Hidden(directory, len(mine), hidden_bytes if stage is None else 0)
            first = 0 if stage is None else stage.resume(observers, hidden)
            task = bar.add_task(description or "", total=(last + 1) * len(mine), completed=first * len(mine))
            if first > last:
                return
            walk = Walk(model, self.stack, self._decoder)
            undo.enter_context(torch.no_grad())
            undo.enter_context(self._force.observing(observers, self.by_key, given_only=True))
            undo.enter_context(self._surroundings())
            ahead = undo.enter_context(Ahead(self._weights))
            for index in range(first, last + 1):
                reading = readers if index == last else []
                behind = self._around_stack(model) if reading else nullcontext()
                with self._loaded(index, ahead), walk.at(index), behind:
                    ahead.start(self._groups(index + 1) if index < last else [])
                    for place, (number, first_sample) in enumerate(mine):
                        batch, inputs = as_batch(batches[number], first_sample)
                        inputs = {k: v.to(device) for k, v in inputs.items()}
                        before = hidden.get(place, device)
                        with self._force.on_batch(batch):
                            if reading:
                                hand_logits(reading, batch, inputs["input_ids"], walk.logits(inputs, before))
                            else:
                                handed = walk.run(inputs, before)
                        if index < last:
                            hidden.put(place, handed)
                        bar.advance(task)
                hidden.turn()
                if index == 0 and last > 1 and mine:
                    self._check_chain(walk, batches, mine, hidden)
                if stage is not None:
                    stage.commit(index + 1, observers, hidden)

    def _check_chain(self, walk: Walk, batches: Any, mine: list[tuple[int, int]], hidden: Hidden) -> None:
        """Keep every layer's output where a layer reads more than that of the layer right before it."""
        place = min(range(len(mine)), key=lambda p: as_batch(batches[mine[p][0]])[0].shape)
        _, inputs = as_batch(batches[mine[place][0]])
        inputs = {k: v.to(self._weights.device) for k, v in inputs.items()}
        hidden.keep_all = walk.reader_of_more(inputs, hidden.get(place, self._weights.device)) is not None

    def _fingerprint(self, batches: Any, observers: Sequence[AnyObserver]) -> dict[str, Any]:
        """What an interrupted observation must have in common with the one that goes on."""
        if self._force.edited:
            raise ValueError("an observation under edits cannot be resumed; leave out work=")
        files = [self.path / "config.json", *self._weights.files]
        return {
            "checkpoint": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files],
            "recipe": [{"kind": op.kind, **op.to_data()} for op in self.state.recipe],
            "dtype": str(self.model.dtype),
            "attention": str(self.model.config._attn_implementation),
            "experts backend": str(self.model.config._experts_implementation),
            "data": digest_of_data(batches),
            "observers": [observer_key(observer) for observer in observers],
        }

    # Load one part at a time

    def _groups(self, index: int) -> list[Group]:
        return self._weights.under(f"{self._list_name}.{index}.")

    def _holders_in(self, index: int) -> list[nn.Module]:
        return [m for layer in self.layers if layer.index == index for m in (layer.router, layer.block, layer.experts)]

    @contextmanager
    def _loaded(self, index: int, ahead: Ahead | None = None) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights, cut as planned; without them again when the block ends."""
        module = self._decoder[index]
        planned = State(module, self._holders_in(index))
        try:
            self._as_opened[index].restore()
            groups = self._groups(index)
            if ahead is not None:
                ahead.wait(groups)
            self._weights.load(groups)
            operations.redo(self, [layer for layer in self.layers if layer.index == index])
            yield module
        finally:
            planned.restore()

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """What the stack holds beside its decoder layers, embeddings above all, with its weights."""
        state = State(self.stack, [])
        groups = self._weights.under(self._prefix(self.stack))
        inside = [g for g in groups if not g.targets[0].startswith(self._list_name + ".")]
        try:
            self._weights.load(inside)
            yield
        finally:
            state.restore()

    @contextmanager
    def _around_stack(self, model: nn.Module) -> Iterator[None]:
        """What `model` holds around the stack, its head above all, with its weights; but no other sub-model's."""
        if model is self.stack:
            yield
            return
        inner, stack = self._prefix(model), self._prefix(self.stack)
        names = [f"{name}." for name, m in self.model.named_modules() if name and isinstance(m, PreTrainedModel)]
        others = tuple(name for name in names if name == stack or not stack.startswith(name))
        groups = [g for g in self._weights.under(inner) if not g.targets[0].startswith(others)]
        ties = self.model.all_tied_weights_keys.items()
        with self._part(groups, {t: s for t, s in ties if t.startswith(inner) and not t.startswith(others)}):
            yield

    def _prefix(self, module: nn.Module) -> str:
        """What the names of the module's tensors begin with."""
        name = next(n for n, m in self.model.named_modules() if m is module)
        return f"{name}." if name else ""

    # Save

    def save(
        self, path: str | Path, *, format: str = "hf", overwrite: bool = False, shard_bytes: int = SHARD_BYTES
    ) -> Path:
        """Write the planned model as a Hugging Face checkpoint, holding one decoder layer in memory at a time.

        The files are those that `ExpertView.save` writes; weights are split at `shard_bytes`.

        Raises:
            ValueError: the model cannot be stored as such a checkpoint; says why and what can be done. Or `path` is,
                lies in or holds the model's own directory.
            FileExistsError: the directory is there and `overwrite` is off, or holds files that moestro did not write.
            OSError: the disk cannot hold it. Nothing is left behind.
        """
        return saving.save(self, path, format=format, overwrite=overwrite, shard_bytes=shard_bytes)

    def _parts(self, names: Collection[str], *, meta: bool = False) -> Iterator[dict[str, Tensor]]:
        """As in memory; every part has its weights until the next is asked for."""
        if meta:
            for index, groups in self._units():
                yield saving.meta(self._tensors(index, groups, names))
            return
        with progress_bar() as bar, Ahead(self._weights) as ahead:
            task = bar.add_task("saving", total=len(self._decoder))
            for index, groups in self._units():
                with self._loaded(index, ahead) if index is not None else self._part(groups):
                    if index is not None:
                        ahead.start(self._groups(index + 1) if index + 1 < len(self._decoder) else [])
                    yield self._tensors(index, groups, names)
                bar.advance(task, index is not None)

    def _units(self) -> Iterator[tuple[int | None, list[Group]]]:
        """Everything in the checkpoint in parts: decoder layers by number, and each group outside of them."""
        for index in range(len(self._decoder)):
            yield index, self._groups(index)
        for group in self._weights.groups:
            if not group.targets[0].startswith(self._list_name + "."):
                yield None, [group]

    def _tensors(self, index: int | None, groups: list[Group], names: Collection[str]) -> dict[str, Tensor]:
        """The tensors of one part that are to be saved, as they are now, by their names in the model."""
        if index is not None:
            prefix = f"{self._list_name}.{index}."
            state = self._decoder[index].state_dict(prefix=prefix)
        else:
            state = {t: self.model.get_parameter_or_buffer(t).detach() for g in groups for t in g.targets}
        return {name: tensor for name, tensor in state.items() if name in names}

    @contextmanager
    def _part(self, groups: list[Group], ties: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
        """These groups with their weights, and {tensor: the loaded one that it is tied to}."""
        owners = {t.rpartition(".")[0] for g in groups for t in g.targets} | {t.rpartition(".")[0] for t in ties}
        states = [State(self.model.get_submodule(owner), [], recurse=False) for owner in owners]
        try:
            self._weights.load(groups)
            for target, source in ties.items():
                owner, _, attribute = target.rpartition(".")
                setattr(self.model.get_submodule(owner), attribute, self.model.get_parameter(source))
            yield
        finally:
            for state in states:
                state.restore()


def _opened_again(path: Path, tokenizer: Any, options: dict[str, Any], recipe: Recipe) -> StreamView:
    """A copy of a streamed view: the same directory, and the same done to it."""
    view = StreamView(path, tokenizer, **options)
    view.apply(recipe)
    return view
