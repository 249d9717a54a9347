"""Adapt the routing to a sequence while it is read and written: a bias on the router logits, fitted to its own text.

    z~[l] = z[l] + delta[l]          delta [E] for each MoE layer l and sequence, 0 at first; all weights frozen

1. Optimisation, on the prompt and whatever was generated since: `steps` gradient steps on the mean next-token loss,
   on delta of the selected layers alone.
2. Generation of `interval` tokens with delta as it is, the KV cache rebuilt; then 1 again, from there.

    rerouter = OnlineRerouter(view)
    with rerouter.session(input_ids):        adapt once, run anything
    rerouter.generate(input_ids, max_new_tokens=512)

Layers are selected anew in every phase 1, for each sequence, by C[l] = -(1/K) sum_k log p[l, k] over the K chosen
experts, averaged over the tokens. The paper calls a large C decisive, and it is the opposite: both readings are
offered, the formula as printed ("printed": the largest C) and what is said of it ("decisive": the smallest).
Left open by what could be read of the paper, and chosen here: Adam, begun anew in every phase; delta is reset with
every sequence; padding does not count; "soft" scales each layer's step by C[l] / mean C, since scaling the gradient
would not change a step of Adam.

Where a family normalises the gate weights over the chosen experts, the others get no gradient. A step keeps the
activations and the logits of the whole context: for long ones, adapt one sequence at a time.
"Rewiring Experts on the Fly: Continuous Rerouting for Better Online Adaptation in Mixture-of-Expert models"
(arXiv:2510.14853). Shapes: B rows, T positions, N = B * T places, V vocabulary, L MoE layers, E experts, K slots.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from moestro.routing import SCORES, Routing, RoutingRule
from moestro.view.edit import Edit, LogitBias
from moestro.view.layers import MoELayer
from moestro.view.observe import as_batch, progress_bar

RATE, STEPS, INTERVAL = 0.05, 5, 128  # the paper's
FRACTION = 0.5
"""Share of the layers that is adapted; the paper's could not be read."""
SHORT = 32
"""A context of fewer tokens tells little about what follows; measured on small models."""
IGNORED = -100

Deltas = dict[int, Float[Tensor, "b e"]]
"""{MoE layer: a vector for each sequence}"""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass(eq=False)
class RowBias(Edit):
    """Add to the router logits a vector that each row of the batch has for itself, in fp32. Gradients reach it."""

    bias: Mapping[int, Float[Tensor, "b e"]]

    def layers(self) -> Collection[int]:
        return self.bias.keys()

    def check(self, layer: MoELayer) -> None:
        shape = tuple(self.bias[layer.index].shape)
        if len(shape) != 2 or shape[1] != layer.num_experts:
            raise ValueError(f"bias of shape {shape} for rows of {layer.num_experts} experts in layer {layer.index}")

    def logits(self, layer: int, logits: Tensor, prefer: Tensor) -> tuple[Tensor, Tensor]:
        bias = self.bias[layer].to(logits.device)
        if len(logits) % len(bias):
            raise ValueError(f"a bias for {len(bias)} rows, and {len(logits)} places in the batch; give each row one")
        bias = F.pad(bias, (0, logits.shape[1] - bias.shape[1]))  # classes that stand for "no expert"
        rows = logits.float().view(len(bias), -1, logits.shape[1])
        return (rows + bias[:, None]).flatten(0, 1), prefer


@dataclass(eq=False)
class _Scored(RowBias):
    """Finds C of every layer and row on the way, and the experts that a row's tokens used."""

    rules: Mapping[int, RoutingRule]
    real: Float[Tensor, "b t"]
    scores: dict[int, Float[Tensor, " b"]] = field(default_factory=dict)
    used: dict[int, Bool[Tensor, "b e"]] = field(default_factory=dict)

    def routing(self, layer: int, routing: Routing) -> Routing:
        scores = SCORES[self.rules[layer].score](routing.logits.detach().float())
        log_p = (scores / scores.sum(dim=1, keepdim=True)).clamp_min(1e-20).log()
        real = self.real.to(log_p.device)
        used = (routing.weights != 0) & (real.view(-1, 1) != 0)
        indices = routing.indices.clamp(max=log_p.shape[1] - 1)
        undecided = -(log_p.gather(1, indices) * used).sum(dim=1) / used.sum(dim=1).clamp(min=1)
        self.scores[layer] = (undecided.view_as(real).sum(dim=1) / real.sum(dim=1)).to(self.real.device)
        served = torch.zeros_like(scores).scatter_add(1, indices, used.float()).view(*real.shape, -1).sum(dim=1)
        self.used[layer] = (served > 0)[:, : self.bias[layer].shape[1]].to(self.real.device)
        return routing

    def clear_noise(self) -> None:
        """No gradient for experts that had none but rounding: Adam would make a full step of it."""
        for layer, delta in self.bias.items():
            if delta.grad is not None and (self.rules[layer].normalize or self.rules[layer].softmax_of_chosen):
                delta.grad.masked_fill_(~self.used[layer], 0.0)


@dataclass(frozen=True)
class Adapted:
    """What a phase of optimisation found."""

    deltas: Deltas
    losses: Float[Tensor, "s b"]
    """Mean loss of each context before each step, nats per token."""
    shares: Float[Tensor, "b l"]
    """How much of a step each layer took: 1 or 0, or any weight where layers are chosen softly; 0 without steps."""

    @property
    def edits(self) -> list[RowBias]:
        """The edit that steers these sequences; none where nothing was learned."""
        return [RowBias(self.deltas)] if any(bool(d.any()) for d in self.deltas.values()) else []


@dataclass(frozen=True)
class Rerouted:
    """Generated sequences and how the routing was adapted on the way."""

    sequences: Int[Tensor, "b t"]
    deltas: Deltas
    losses: list[Float[Tensor, "s b"]]
    """Of every phase, as in Adapted; NaN for sequences that had ended."""

    @property
    def phases(self) -> int:
        return len(self.losses)


class OnlineRerouter:
    """Test-time adaptation of an open language model's routing; sequences of a batch do not influence each other."""

    def __init__(
        self,
        view: Any,
        *,
        lr: float = RATE,
        steps: int = STEPS,
        interval: int = INTERVAL,
        layers: str = "printed",
        fraction: float = FRACTION,
        optimizer: str = "adam",
        seed: int = 0,
    ):
        """`layers`: how those to adapt are selected, a name in SELECTIONS. `seed`: of random ones.

        Raises ValueError for settings out of range, or a layer whose routing cannot be re-run.
        """
        if not lr > 0 or steps < 0 or interval < 1 or not 0 < fraction <= 1:
            raise ValueError(
                f"lr={lr}, steps={steps}, interval={interval}, fraction={fraction}: give a rate above 0, 0 or more "
                "steps, an interval of 1 or more, and a fraction above 0 and up to 1"
            )
        for name, known in ((layers, SELECTIONS), (optimizer, OPTIMIZERS)):
            if name not in known:
                raise ValueError(f"{name!r} is none of {', '.join(known)}")
        self.view, self.lr, self.steps, self.interval = view, lr, steps, interval
        self.layers, self.fraction, self.optimizer = layers, fraction, optimizer
        self._generator = torch.Generator().manual_seed(seed)
        with view.edits(RowBias(self._zeros(1))):
            pass  # refused now, not after the first prompt

    def _zeros(self, rows: int) -> Deltas:
        device = self.view.device
        return {layer.index: torch.zeros(rows, layer.num_experts, device=device) for layer in self.view.layers}

    def adapt(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Shaped[Tensor, "b t"] | None = None,
        *,
        start: Mapping[int, Float[Tensor, "b e"]] | None = None,
    ) -> Adapted:
        """Phase 1 on these contexts, from `start` or from 0. The model's weights and gradients stay as they are.

        Raises ValueError for a context of fewer than two tokens. A sequence whose loss or gradient is not finite
        loses its deltas, with a warning.
        """
        model, layers = self.view.model, self.view.layers
        with torch.inference_mode(False), torch.enable_grad(), _frozen(model):
            ids, real = _left(input_ids, attention_mask)
            _check_lengths(real)
            deltas = {i: d.clone() for i, d in (start or self._zeros(len(ids))).items()}
            optimizer = OPTIMIZERS[self.optimizer]([d.requires_grad_() for d in deltas.values()], lr=self.lr)
            edit = _Scored(deltas, {layer.index: layer.rule for layer in layers}, real.float())
            shares = torch.zeros(len(ids), len(layers), device=ids.device)
            losses = []
            for step in range(self.steps):
                with self.view.edits(edit):
                    loss = context_loss(model, ids, real)
                if step == 0:
                    scores = torch.stack([edit.scores[layer.index] for layer in layers], dim=1)
                    shares = SELECTIONS[self.layers](scores, _count(self.fraction, len(layers)), self._generator)
                    shares = shares.to(ids.device)
                _step(optimizer, edit, loss, shares)
                losses.append(loss.detach())
            found = {i: d.detach() for i, d in deltas.items()}
        return Adapted(found, torch.stack(losses) if losses else shares.new_zeros(0, len(ids)), shares)

    @contextmanager
    def session(
        self, input_ids: Int[Tensor, "b t"], attention_mask: Shaped[Tensor, "b t"] | None = None
    ) -> Iterator[Adapted]:
        """Adapt once and steer whatever runs inside the block, in batches of as many rows; gone afterwards."""
        adapted = self.adapt(input_ids, attention_mask)
        with self.view.edits(*adapted.edits):
            yield adapted

    def generate(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Shaped[Tensor, "b t"] | None = None,
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        **options: Any,
    ) -> Rerouted:
        """Both phases in turn until every sequence has ended; `options` go to transformers' `generate`.

        Padding is on the left, as for `generate`. Raises ValueError for options that make several sequences of a
        prompt, or bring a KV cache of their own.
        """
        model = self.view.model
        ends, pad = _check_options(model.generation_config, options)
        ids, mask = input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        deltas, losses, made = self._zeros(len(ids)), [], 0
        live = torch.arange(len(ids), device=ids.device)
        while made < max_new_tokens and len(live):
            adapted = self.adapt(ids[live], mask[live], start={i: d[live] for i, d in deltas.items()})
            losses.append(
                adapted.losses.new_full((self.steps, len(ids)), float("nan")).index_copy(1, live, adapted.losses)
            )
            deltas = {i: d.index_copy(0, live, adapted.deltas[i]) for i, d in deltas.items()}
            length = min(self.interval, max_new_tokens - made)
            with self.view.edits(*adapted.edits):
                new = model.generate(
                    input_ids=ids[live],
                    attention_mask=mask[live],
                    max_new_tokens=length,
                    min_new_tokens=min(max(min_new_tokens - made, 0), length),
                    **{**options, "pad_token_id": pad},
                )[:, ids.shape[1] :]
            ended = torch.isin(new, ends.to(new.device))
            before_end = ended.long().cumsum(dim=1) - ended.long() == 0
            ids = torch.cat([ids, new.new_full((len(ids), new.shape[1]), pad).index_copy(0, live, new)], dim=1)
            mask = F.pad(mask, (0, new.shape[1])).index_copy(0, live, torch.cat([mask[live], before_end.long()], dim=1))
            live, made = live[~ended.any(dim=1)], made + new.shape[1]
            if new.shape[1] < length:
                break  # a stopping criterion
        return Rerouted(ids, deltas, losses)


def context_loss(model: Any, ids: Int[Tensor, "b t"], real: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """Mean next-token loss of each row, nats, in fp32; padding is on the right."""
    logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[:, :-1]
    target = ids[:, 1:].masked_fill(~real[:, 1:], IGNORED)
    each = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORED, reduction="none")
    return each.view_as(target).sum(dim=1) / (target != IGNORED).sum(dim=1)


def fit_bias(
    view: Any, data: Iterable[Any], *, lr: float = RATE, passes: int = STEPS, progress: bool = True
) -> LogitBias:
    """One bias for all texts, in all layers: `passes` over the batches, with one step of Adam for each.

    What adapting to a domain beforehand gives, without the adaptation to a sequence; it can be saved as steering.
    """
    batches = [as_batch(item)[1] for item in data]
    with torch.inference_mode(False), torch.enable_grad(), _frozen(view.model), progress_bar(progress) as bar:
        bias = {layer.index: torch.zeros(layer.num_experts, device=view.device) for layer in view.layers}
        optimizer = torch.optim.Adam([b.requires_grad_() for b in bias.values()], lr=lr)
        task = bar.add_task("fitting a bias", total=passes * len(batches))
        for _ in range(passes):
            for inputs in batches:
                ids, real = _left(inputs["input_ids"].to(view.device), inputs.get("attention_mask"))
                _check_lengths(real)
                with view.edits(LogitBias(bias)):
                    loss = context_loss(view.model, ids, real).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                bar.advance(task)
    return LogitBias({i: b.detach() for i, b in bias.items()})


# --- which layers ----------------------------------------------------------------------------------------------------


def _best(scores: Tensor, count: int) -> Tensor:
    return torch.zeros_like(scores).scatter(1, scores.topk(count, dim=1).indices, 1.0)


SELECTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "printed": lambda scores, count, _: _best(scores, count),
    "decisive": lambda scores, count, _: _best(-scores, count),
    "all": lambda scores, count, _: torch.ones_like(scores),
    "random": lambda scores, count, generator: _best(torch.rand(scores.shape, generator=generator), count),
    "last": lambda scores, count, _: _best(torch.arange(scores.shape[1]).float().expand(scores.shape), count),
    "soft": lambda scores, count, _: scores / scores.mean(dim=1, keepdim=True),
}
"""{name: (C [B, L], how many, generator) -> the share of a step that each layer takes [B, L]}"""


def _count(fraction: float, layers: int) -> int:
    return max(1, round(fraction * layers))


# --- one step --------------------------------------------------------------------------------------------------------


def _step(optimizer: torch.optim.Optimizer, edit: _Scored, loss: Float[Tensor, " b"], shares: Tensor) -> None:
    """A step on the rows' losses, scaled layer by layer; rows that are not finite go back to 0."""
    deltas, lost = edit.bias, ~torch.isfinite(loss.detach())
    torch.where(lost, 0.0, loss).sum().backward()
    edit.clear_noise()
    lost |= torch.stack([~torch.isfinite(d.grad).all(dim=1) for d in deltas.values() if d.grad is not None]).any(dim=0)
    if lost.any():
        warnings.warn(
            f"row {int(lost.nonzero()[0])}: the loss of the context or its gradient is not finite; the deltas of the "
            "sequence are set back to 0",
            stacklevel=3,
        )
    with torch.no_grad():
        before = {i: d.clone() for i, d in deltas.items()}
        for d in deltas.values():
            if d.grad is not None:
                d.grad[lost] = 0.0
        optimizer.step()
        optimizer.zero_grad()
        for share, (i, d) in zip(shares.T, deltas.items()):
            d.copy_((before[i] + share[:, None] * (d - before[i])).masked_fill(lost[:, None], 0.0))
            d.requires_grad_(bool(share.any()))  # what no row adapts needs no gradient from here on


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the weights, and no dropout."""
    trained, training = [p for p in model.parameters() if p.requires_grad], model.training
    try:
        model.eval()
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        model.train(training)


def _left(ids: Tensor, mask: Tensor | None) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """Ids and which of them are real, with the padding moved to the right, where positions need no telling."""
    if mask is None:
        return ids.clone(), torch.ones_like(ids, dtype=torch.bool)
    real = mask.to(ids.device).bool()
    order = (~real).long().argsort(dim=1, stable=True)
    return ids.gather(1, order), real.gather(1, order)


def _check_lengths(real: Bool[Tensor, "b t"]) -> None:
    """Refuse contexts of fewer than two tokens, and warn of short ones."""
    lengths = real.sum(dim=1)
    row, shortest = int(lengths.argmin()), int(lengths.min())
    if shortest < 2:
        raise ValueError(f"row {row} has {shortest} tokens; there is nothing to predict in fewer than 2")
    if shortest < SHORT:
        warnings.warn(f"row {row} has {shortest} tokens: too few to adapt to; give {SHORT} or more", stacklevel=3)


def _check_options(config: Any, options: Mapping[str, Any]) -> tuple[Tensor, int]:
    """(tokens that end a sequence, the padding token)"""

    def stated(name: str) -> Any:
        return options[name] if name in options else getattr(options.get("generation_config", config), name, None)

    for name in ("num_beams", "num_return_sequences"):
        if (stated(name) or 1) > 1:
            raise ValueError(f"{name}={stated(name)}: the routing is adapted to one sequence a prompt; use {name}=1")
    for name in ("past_key_values", "return_dict_in_generate", "max_length"):
        if options.get(name):
            raise ValueError(f"{name} cannot be given: generation goes in stretches, each with a new KV cache")
    ends = stated("eos_token_id")
    ends = torch.as_tensor([] if ends is None else ends, dtype=torch.long).reshape(-1)
    pad = stated("pad_token_id")
    return ends, int(pad) if pad is not None else int(ends[0]) if len(ends) else 0
