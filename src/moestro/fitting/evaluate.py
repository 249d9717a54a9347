"""Measure a model: held-out loss by domain, generations, speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from moestro.data import TokenBatch
from moestro.view.observe import progress_bar

LOGIT_BYTES = 512 * 2**20
"""Memory for the logits of one batch; bounds the batch size of an evaluation."""


def batch_tokens(config: Any) -> int:
    """How many tokens a batch may hold so that fp32 logits stay within LOGIT_BYTES."""
    vocab = getattr(config.get_text_config(), "vocab_size", 32_000)
    return int(min(max(LOGIT_BYTES // (4 * vocab), 256), 8192))


@torch.no_grad()
def heldout_loss(
    model: Any,
    batches: Iterable[TokenBatch],
    *,
    around: Callable[[TokenBatch], AbstractContextManager[Any]] = nullcontext,
    description: str = "held-out loss",
    progress: bool = True,
) -> dict[str, tuple[float, int]]:
    """{domain: (mean loss in nats per predicted token, number of predicted tokens)}.

    Each forward pass runs inside `around(batch)`: `view.reading`, say, where something observes.

    Raises FloatingPointError where a domain's loss is not finite.
    """
    total: dict[str, list[float]] = {}
    with progress_bar(progress) as bar:
        task = bar.add_task(description, total=len(batches))  # type: ignore[arg-type]
        for batch in batches:
            on_device = batch.to(model.device)
            ids, mask = on_device.input_ids, on_device.attention_mask
            with around(batch):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none").view(target.shape)
            per_row, count = loss.double().sum(dim=1).tolist(), (target != -100).sum(dim=1).tolist()
            for domain, summed, row_count in zip(batch.domain.tolist(), per_row, count):
                sums = total.setdefault(batch.domains[domain], [0.0, 0])
                sums[0] += summed
                sums[1] += row_count
            bar.advance(task)
    losses = {name: (loss / max(n, 1), int(n)) for name, (loss, n) in total.items()}
    for name, (mean, _) in losses.items():
        if not mean < float("inf"):
            raise FloatingPointError(f"the loss on {name!r} is {mean}: the model gives NaN or infinite logits")
    return losses


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
