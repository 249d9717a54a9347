"""Fine-tune a multimodal model so that an input that should not matter does not sway it.

    L      = CE(clean and perturbed rows) + CE(embeddings + n * mask) + weight * consistency
    n      : uniform in [-eps, eps], then `steps` times n <- clip(n + alpha * grad of CE, -eps, eps)
    mask   : image-heavy rows -> text tokens but the answer; text-heavy rows -> image tokens; others -> none
    consistency : divergence of the predictions at the answer's tokens from the clean row's, which gets no gradient

The gradient is taken raw, not its sign, so that n may stay near its random start: the loss object reports by how much
the random start and the whole search raise the loss. The divergences are KL(perturbed || clean), the textbook's JS (the
released code has KL(middle || each side)) and the MSE of the last hidden states; probabilities are not clamped at 1e-6
as there, which is a fair part of the mass of a large vocabulary. All are means over an original's perturbed copies and
answer tokens, then over originals. A token's prediction is read one place before it, and the answers' tokens are
aligned by their order, wherever a prefix has moved them. Losses of routers are no part of this.

    loss = ModalityRobustnessLoss(consistency="kl", adversary=PGD())
    train_modality_robust(model, batches, loss)

"Diagnosing and Mitigating Modality Interference in Multimodal Large Language Models" (arXiv:2505.19616).
Shapes: B rows, T tokens, H hidden, V vocabulary, M answer tokens of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from moestro.analyze.modality_interference import Perturbation
from moestro.analyze.questions import Question
from moestro.view.layers import decoder_of
from moestro.view.observe import progress_bar

TEXT, IMAGE, NEITHER = 0, 1, -1
"""Of a token, in `modality_ids`. NEITHER: padding and special tokens, which are never perturbed."""
IMAGE_HEAVY, TEXT_HEAVY, BOTH = 0, 1, 2
"""Of a row, in `kind`: what its answer hangs on."""
KINDS = (IMAGE_HEAVY, TEXT_HEAVY, BOTH)
MIX = (2, 2, 4)  # rows of each kind; the paper's
IGNORED = -100
WEIGHT = 0.1  # 0.01 in the released configurations, whose sum over copies and answer tokens is a mean here

Consistency = Literal["kl", "js", "mse"]


@dataclass(frozen=True)
class ModalityBatch:
    """Rows with their answers, what each token and row is, and which row is whose clean version."""

    inputs: Mapping[str, Any]
    """What the model's forward takes, without labels."""
    labels: Int[Tensor, "b t"]
    """Ids of the answer's tokens, IGNORED elsewhere."""
    modality_ids: Int[Tensor, "b t"]
    kind: Int[Tensor, " b"]
    origin: Int[Tensor, " b"]
    """Row of the clean version; clean rows name themselves."""

    def __post_init__(self) -> None:
        rows = torch.arange(len(self.origin), device=self.origin.device)
        if not torch.isin(self.origin, rows).all() or (self.origin[self.origin] != self.origin).any():
            raise ValueError(f"origin={self.origin.tolist()}: every row must name a clean row, which names itself")
        counts = (self.labels[:, 1:] != IGNORED).sum(dim=1)
        if not counts.all():
            raise ValueError(f"row {int((counts == 0).nonzero()[0])} has no answer token to learn; give it labels")
        unequal = (counts != counts[self.origin]).nonzero().flatten().tolist()
        if unequal:
            row, clean = unequal[0], int(self.origin[unequal[0]])
            raise ValueError(
                f"the answer of row {row} has {int(counts[row])} tokens, that of its clean row {clean} "
                f"{int(counts[clean])}: they cannot be compared; pair rows with the same answer"
            )
        if not torch.isin(self.kind, torch.tensor(KINDS, device=self.kind.device)).all():
            raise ValueError(f"kind={self.kind.tolist()}: rows are image-heavy 0, text-heavy 1, or need both 2")

    def to(self, device: torch.device | str) -> ModalityBatch:
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.inputs.items()}
        return ModalityBatch(moved, *(t.to(device) for t in (self.labels, self.modality_ids, self.kind, self.origin)))


def adversary_mask(batch: ModalityBatch) -> Bool[Tensor, "b t"]:
    """The tokens whose embeddings may be perturbed: those of the input that the row's answer does not hang on."""
    text = (batch.modality_ids == TEXT) & (batch.labels == IGNORED)
    image, kind = batch.modality_ids == IMAGE, batch.kind[:, None]
    return torch.where(kind == IMAGE_HEAVY, text, (kind == TEXT_HEAVY) & image)


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent. `sign`: step along the sign of the gradient, as is usual elsewhere."""

    alpha: float = 0.1
    eps: float = 1e-3
    steps: int = 2
    sign: bool = False

    def __post_init__(self) -> None:
        if self.alpha <= 0 or self.eps <= 0 or self.steps < 0:
            raise ValueError(f"{self}: alpha and eps must be positive, steps 0 or more")

    def __call__(
        self, loss_at: Callable[[Tensor], Tensor], like: Float[Tensor, "b t h"], generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "b t h"], float | None]:
        """The noise, and the loss at its random start (None without steps). No weight gets a gradient."""
        noise = torch.empty_like(like).uniform_(-self.eps, self.eps, generator=generator)
        first = None
        with torch.enable_grad():
            for _ in range(self.steps):
                noise.requires_grad_()
                loss = loss_at(noise)
                (gradient,) = torch.autograd.grad(loss, noise)
                first = float(loss.detach()) if first is None else first
                step = gradient.sign() if self.sign else gradient
                noise = (noise + self.alpha * step).detach().clamp(-self.eps, self.eps)
        return noise, first


@dataclass(frozen=True)
class Gaussian:
    """Noise that looks for nothing: the paper's cheaper variant, and the control of the search."""

    sigma: float = 0.05

    def __call__(
        self, loss_at: Callable[[Tensor], Tensor], like: Float[Tensor, "b t h"], generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "b t h"], float | None]:
        return self.sigma * torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device), None


class Pass(NamedTuple):
    """One forward pass at the answer's tokens, row by row."""

    logits: Float[Tensor, "m v"]
    hidden: Float[Tensor, "m h"]
    loss: Float[Tensor, ""]


@contextmanager
def _embeddings_plus(decoder: nn.Module, noise: Tensor | None) -> Iterator[dict[str, Tensor]]:
    """Inside, the decoder adds `noise` [B, T, H] to its input embeddings; yields {"hidden": what it gave}."""
    seen: dict[str, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = module.get_input_embeddings()(args[0] if args else kwargs["input_ids"])  # type: ignore[operator]
        if noise is not None:
            if embeds.shape != noise.shape:
                raise ValueError(
                    f"the decoder reads embeddings {tuple(embeds.shape)}, and modality_ids tell of "
                    f"{tuple(noise.shape[:2])} tokens; give one id for each token, image tokens included"
                )
            embeds = embeds + noise.to(embeds.dtype)
        kwargs = {**kwargs, "inputs_embeds": embeds}
        return ((None, *args[1:]), kwargs) if args else ((), {**kwargs, "input_ids": None})

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        seen["hidden"] = out[0] if isinstance(out, tuple) else out.last_hidden_state

    hooks = [decoder.register_forward_pre_hook(before, with_kwargs=True), decoder.register_forward_hook(after)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def answers(model: nn.Module, batch: ModalityBatch, noise: Float[Tensor, "b t h"] | None = None) -> Pass:
    """Run the model, with `noise` on the decoder's input embeddings, and keep what predicts the answers' tokens."""
    with _embeddings_plus(decoder_of(model), noise) as seen:
        logits = model(**batch.inputs, use_cache=False).logits
    target = batch.labels[:, 1:]
    where = target != IGNORED
    chosen = logits[:, :-1][where].float()
    loss = F.cross_entropy(chosen, target[where])
    return Pass(chosen, seen["hidden"][:, :-1][where], loss)


def adversarial_noise(
    adversary: PGD | Gaussian, model: nn.Module, batch: ModalityBatch, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "b t h"], float | None]:
    """Noise for the tokens of `adversary_mask`, 0 for all others, and the loss at its random start."""
    mask = adversary_mask(batch)[:, :, None]
    width = decoder_of(model).get_input_embeddings().weight.shape[1]  # type: ignore[operator, union-attr]
    like = torch.empty(*mask.shape[:2], width, device=mask.device)
    noise, start = adversary(lambda n: answers(model, batch, n * mask).loss, like, generator)
    return noise * mask, start


def kl(perturbed: Float[Tensor, "m v"], clean: Float[Tensor, "m v"]) -> Float[Tensor, " m"]:
    """KL(perturbed || clean) of logits: pulls what is perturbed toward what the clean row is sure of."""
    log_q, log_p = perturbed.log_softmax(dim=-1), clean.log_softmax(dim=-1)
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1)


def js(perturbed: Float[Tensor, "m v"], clean: Float[Tensor, "m v"]) -> Float[Tensor, " m"]:
    """Half of KL(perturbed || middle) + KL(clean || middle) of logits: symmetric, at most log 2."""
    log_q, log_p = perturbed.log_softmax(dim=-1), clean.log_softmax(dim=-1)
    middle = torch.logaddexp(log_q, log_p) - math.log(2)
    return (log_q.exp() * (log_q - middle) + log_p.exp() * (log_p - middle)).sum(dim=-1) / 2


def mse(perturbed: Float[Tensor, "m h"], clean: Float[Tensor, "m h"]) -> Float[Tensor, " m"]:
    """Mean squared difference of hidden states."""
    return (perturbed.float() - clean.float()).square().mean(dim=-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": kl, "js": js, "mse": mse}


@dataclass(frozen=True)
class Terms:
    """The loss of a batch and what it is made of."""

    loss: Float[Tensor, ""]
    supervised: float
    adversarial: float | None
    """Cross-entropy on the perturbed embeddings."""
    consistency: float | None
    random_rise: float | None
    """By how much the noise's random start raises the cross-entropy: what the search is held against."""
    rise: float | None
    """By how much the noise raises it in the end."""
    skipped: int
    """Comparisons that were left out of the consistency because a logit was not finite."""


@dataclass
class ModalityRobustnessLoss:
    """All rungs of the paper's ladder: supervised alone, with a consistency, with an adversary, with both."""

    consistency: Consistency | None = None
    weight: float = WEIGHT
    adversary: PGD | Gaussian | None = None
    generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.consistency not in (None, *DIVERGENCES):
            raise ValueError(f"consistency={self.consistency!r}; choose one of {[*DIVERGENCES]}, or None")
        if self.weight < 0:
            raise ValueError(f"weight={self.weight} would drive predictions apart; choose 0 or more")

    def __call__(self, model: nn.Module, batch: ModalityBatch) -> Terms:
        """The loss of a batch, with gradients to the weights."""
        clean = answers(model, batch)
        loss, hard, start = clean.loss, None, None
        if self.adversary is not None:
            noise, start = adversarial_noise(self.adversary, model, batch, self.generator)
            hard = answers(model, batch, noise)
            loss = loss + hard.loss
        consistency, skipped = None, 0
        if self.consistency is not None:
            consistency, skipped = self._consistency(batch, clean, hard)
            loss = loss + self.weight * consistency
        base = float(clean.loss.detach())
        return Terms(
            loss,
            supervised=base,
            adversarial=None if hard is None else float(hard.loss.detach()),
            consistency=None if consistency is None else float(consistency.detach()),
            random_rise=None if start is None else start - base,
            rise=None if hard is None else float(hard.loss.detach()) - base,
            skipped=skipped,
        )

    def _consistency(self, batch: ModalityBatch, clean: Pass, hard: Pass | None) -> tuple[Float[Tensor, ""], int]:
        """Mean over originals of the mean divergence of their perturbed copies, and the comparisons left out."""
        assert self.consistency is not None
        row, of_clean = _aligned(batch)
        perturbed = batch.origin[row] != row
        pairs = [(clean, perturbed)]
        if hard is not None:
            pairs.append((hard, adversary_mask(batch).any(dim=1)[row]))
        values, origins, skipped = [], [], 0
        for copy, chosen in pairs:
            name = "hidden" if self.consistency == "mse" else "logits"
            states, reference = getattr(copy, name), getattr(clean, name).detach()[of_clean]
            finite = torch.isfinite(states).all(dim=-1) & torch.isfinite(reference).all(dim=-1)
            skipped += int((chosen & ~finite).sum())
            kept = chosen & finite
            values.append(DIVERGENCES[self.consistency](states[kept], reference[kept]))
            origins.append(batch.origin[row][kept])
        value, origin = torch.cat(values), torch.cat(origins)
        if not len(value):
            return clean.loss.new_zeros(()), skipped
        _, place, counts = origin.unique(return_inverse=True, return_counts=True)
        return value.new_zeros(len(counts)).index_add(0, place, value / counts[place]).mean(), skipped


def _aligned(batch: ModalityBatch) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Of every answer token: its row, and the place among the M of the same token of the clean row."""
    where = batch.labels[:, 1:] != IGNORED
    row, counts = where.nonzero()[:, 0], where.sum(dim=1)
    start = counts.cumsum(dim=0) - counts
    order = torch.arange(len(row), device=row.device) - start[row]
    return row, start[batch.origin[row]] + order


def augmented(
    questions: Sequence[Question], suite: Mapping[str, Perturbation], *, copies: int = 1, seed: int = 0
) -> tuple[list[Question], list[int]]:
    """The questions and, behind them, `copies` perturbed versions of each, by perturbations drawn at random.

    Returns them with the place of each one's clean version. Raises ValueError for an empty suite.
    """
    if not suite or copies < 0:
        raise ValueError(
            f"{len(suite)} perturbations, {copies} copies; give a perturbation or more and 0 copies or more"
        )
    rng, made = np.random.default_rng(seed), list(suite.values())
    rows, origin = list(questions), list(range(len(questions)))
    for _ in range(copies):
        rows += [made[int(rng.integers(len(made)))](question, rng).question for question in questions]
        origin += range(len(questions))
    return rows, origin


def anchored_rows(
    sizes: Sequence[int], batches: int, *, mix: Sequence[int] = MIX, batch_size: int = 8, seed: int = 0
) -> Iterator[list[list[int]]]:
    """For every batch, the rows to take of each kind's data: always in the proportions of `mix`.

    Each kind is shuffled anew when it has run out. Raises ValueError where `mix` does not divide the batch.
    """
    if len(sizes) != len(mix) or sum(mix) < 1 or batch_size % sum(mix) or min(mix) < 0:
        raise ValueError(
            f"batch_size={batch_size} cannot be split {list(mix)} over {len(sizes)} kinds of data; give a "
            "share for each kind and a multiple of their sum"
        )
    if empty := [i for i, (size, share) in enumerate(zip(sizes, mix)) if share and not size]:
        raise ValueError(f"kind {empty[0]} has a share of {mix[empty[0]]} and no data; give some, or a share of 0")
    rng = np.random.default_rng(seed)
    queues: list[list[int]] = [[] for _ in sizes]
    for _ in range(batches):
        chosen = []
        for queue, size, share in zip(queues, sizes, mix):
            count = share * batch_size // sum(mix)
            while len(queue) < count:
                queue += rng.permutation(size).tolist()
            chosen.append(queue[:count])
            del queue[:count]
        yield chosen


def train_modality_robust(
    model: nn.Module,
    batches: Sequence[ModalityBatch],
    loss: ModalityRobustnessLoss,
    *,
    rate: float = 2e-5,
    warmup: float = 0.03,
    weight_decay: float = 1e-4,
    max_grad_norm: float | None = None,
    description: str = "fine-tuning",
    progress: bool = True,
) -> list[Terms]:
    """Train every weight that requires a gradient, one step a batch; returns what each step's loss was made of.

    AdamW with the paper's settings, cosine decay. Raises FloatingPointError where the loss is not finite.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights or not len(batches):
        raise ValueError(f"{len(weights)} weights to train on {len(batches)} batches: there is nothing to do")
    optimiser = torch.optim.AdamW(weights, lr=rate, eps=1e-6, weight_decay=weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimiser, int(warmup * len(batches)), len(batches))
    history, was_training, device = [], model.training, weights[0].device
    model.train()
    try:
        with progress_bar(progress) as bar:
            task = bar.add_task(description, total=len(batches))
            for step, batch in enumerate(batches):
                terms = loss(model, batch.to(device))
                if not torch.isfinite(terms.loss):
                    raise FloatingPointError(f"the loss is {float(terms.loss)} at step {step}: {terms}; lower the rate")
                terms.loss.backward()
                if max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(weights, max_grad_norm)
                optimiser.step()
                optimiser.zero_grad()
                schedule.step()
                history.append(Terms(terms.loss.detach(), *(getattr(terms, n) for n in _NUMBERS)))
                bar.advance(task)
    finally:
        model.train(was_training)
    return history


_NUMBERS = ("supervised", "adversarial", "consistency", "random_rise", "rise", "skipped")
