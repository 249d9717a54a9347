"""Measure a model: held-out loss by domain, generations, speed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moestro.data import TokenBatch
from moestro.view.events import Batch, MoEEvent
from moestro.view.observe import as_batch, progress_bar

LOGIT_BYTES = 512 * 2**20
"""Memory for the logits of one batch; bounds the batch size of an evaluation."""
FP32_BYTES = 64 * 2**20
"""Logits are made fp32 in parts of this size."""
NO_TARGET = -100


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
        """Raises FloatingPointError where a domain's loss is not finite."""
        losses = {name: (loss / max(n, 1), int(n)) for name, (loss, n) in self._sums.items()}
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
