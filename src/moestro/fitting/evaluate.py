"""Measure a model: held-out loss by domain, generations, speed."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moestro.data import TokenBatch, TokenBatches
from moestro.view.events import Batch, MoEEvent
from moestro.view.observe import as_batch, progress_bar

LOGIT_BYTES = 512 * 2**20
"""Memory for the logits of one batch; bounds the batch size of an evaluation."""
FP32_BYTES = 64 * 2**20
"""Logits are made fp32 in parts of this size."""
NO_TARGET = -100
ENOUGH_PREDICTIONS = 500
"""Predicted tokens below which a held-out loss is called uncertain: at a spread of 2 nats from token to token, the
mean then has a standard error of some 0.1."""


def check_heldout(batches: TokenBatches, domains: Iterable[str]) -> None:
    """Refuse held-out data without predictions in one of its domains, and warn where they are few.

    A token is predicted where its window has one before it. `domains`: those that must be there.

    Raises ValueError that names the domain and its numbers.
    """
    tokens = batches.tokens_by_domain
    windows = Counter(batches.domains[d] for b in batches.plan for d in batches.domain[b].tolist())
    predicted = {name: count - windows[name] for name, count in tokens.items()}
    for name in [*domains, *tokens]:
        if predicted.get(name, 0) < 1:
            raise ValueError(
                f"the held-out part of {name!r} has {tokens.get(name, 0)} tokens, of which {predicted.get(name, 0)} "
                "can be predicted, so there is no loss to measure; give more or longer texts, or raise heldout_tokens"
            )
    if few := {name: n for name, n in predicted.items() if n < ENOUGH_PREDICTIONS}:
        stated = ", ".join(f"{name!r} {n:,}" for name, n in few.items())
        warnings.warn(
            f"held-out losses of {stated} predicted tokens are uncertain: below {ENOUGH_PREDICTIONS:,} a mean is off "
            "by some 0.1 nats; give more texts, or raise heldout_tokens",
            stacklevel=3,
        )


def batch_tokens(config: Any) -> int:
    """How many tokens a batch may hold so that fp32 logits stay within LOGIT_BYTES."""
    vocab = getattr(config.get_text_config(), "vocab_size", 32_000)
    return int(min(max(LOGIT_BYTES // (4 * vocab), 256), 8192))


class HeldoutLoss:
    """{domain: (mean loss in nats per predicted token, number of predicted tokens)}.

    A token is predicted where the one before it is a token as well, not padding. Sums are kept in float64.
    """

    needs = frozenset({"lm_logits"})

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def update(self, event: MoEEvent) -> None:
        pass

    def update_logits(self, batch: Batch, ids: Int[Tensor, "b t"], logits: Float[Tensor, "b t v"]) -> None:
        domain = batch.on_grid(batch.tokens.domain, -1)
        known = (domain >= 0).to(ids.device)
        target = ids[:, 1:].masked_fill(~(known[:, :-1] & known[:, 1:]), NO_TARGET)
        per_row = token_losses(logits[:, :-1], target).double().sum(dim=1).tolist()
        for name, summed, count in zip(domain.amax(dim=1).tolist(), per_row, (target != NO_TARGET).sum(dim=1).tolist()):
            if name >= 0:
                sums = self._sums.setdefault(batch.tokens.domains[name], [0.0, 0])
                sums[0] += summed
                sums[1] += count

    def merge(self, other: Self) -> None:
        for name, (summed, count) in other._sums.items():
            sums = self._sums.setdefault(name, [0.0, 0])
            sums[0] += summed
            sums[1] += count

    def result(self) -> dict[str, tuple[float, int]]:
        """Raises FloatingPointError where a domain's loss is not finite, ValueError where it has no predictions."""
        if blind := [name for name, (_, n) in self._sums.items() if not n]:
            raise ValueError(f"not one token of {blind[0]!r} is predicted: there is no loss; give longer texts")
        losses = {name: (loss / n, int(n)) for name, (loss, n) in self._sums.items()}
        for name, (mean, _) in losses.items():
            if not mean < float("inf"):
                raise FloatingPointError(f"the loss on {name!r} is {mean}: the model gives NaN or infinite logits")
        return losses


def token_losses(logits: Float[Tensor, "b t v"], target: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """Cross-entropy in fp32 of each place; 0 where the target is NO_TARGET."""
    step = max(1, FP32_BYTES // (4 * logits.shape[-1]))
    return torch.stack(
        [
            torch.cat(
                [
                    F.cross_entropy(part.float(), wanted, ignore_index=NO_TARGET, reduction="none")
                    for part, wanted in zip(row.split(step), row_target.split(step))
                ]
            )
            for row, row_target in zip(logits, target)
        ]
    )


@torch.no_grad()
def heldout_loss(
    model: Any,
    batches: Iterable[TokenBatch],
    *,
    progress: bool = True,
) -> dict[str, tuple[float, int]]:
    """What HeldoutLoss finds, of a model that is not open.

    Raises FloatingPointError where a domain's loss is not finite.
    """
    losses = HeldoutLoss()
    with progress_bar(progress) as bar:
        task = bar.add_task("held-out loss", total=len(batches))  # type: ignore[arg-type]
        for item in batches:
            batch, inputs = as_batch(item.to(model.device))
            logits = model(**inputs, use_cache=False).logits
            losses.update_logits(batch, inputs["input_ids"], logits)
            bar.advance(task)
    return losses.result()


@torch.no_grad()
def continuations(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int = 48) -> list[str]:
    """Each prompt continued greedily."""
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        out = model.generate(**ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=_pad(tokenizer))
        texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


@torch.no_grad()
def tokens_per_second(model: Any, tokenizer: Any, *, new_tokens: int = 64, repeats: int = 3) -> float:
    """Median speed of greedy generation of one sequence, after a warm-up."""
    ids = tokenizer("def main():", return_tensors="pt", return_token_type_ids=False).to(model.device)
    rates = []
    for attempt in range(repeats + 1):
        start = time.perf_counter()
        model.generate(
            **ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=_pad(tokenizer)
        )
        if attempt:
            rates.append(new_tokens / (time.perf_counter() - start))
    return sorted(rates)[len(rates) // 2]


def _pad(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
