"""Demonstrations to calibrate on: prompts of a domain, continued by the model itself.

EASY-EP ("Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations", arXiv:2504.06792)
scores experts on a few prompts followed by the unpruned model's own answers: these are the tokens that the model will
read and write when it serves the domain.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moestro.data import TokenBatch
from moestro.view.observe import progress_bar


@torch.no_grad()
def demonstrations(
    view: Any,
    prompts: Iterable[TokenBatch],
    new_tokens: int,
    *,
    temperature: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[TokenBatch]:
    """Each prompt followed by up to `new_tokens` tokens of the model's own, ready for `view.observe`.

    Rows keep their sample and domain. An answer ends with its first end-of-sequence token, which belongs to it.
    Greedy where `temperature` is None, else sampled by `seed`; the global random state stays as it is.

    Raises ValueError, before anything is generated, where prompt and answer exceed the model's context.
    """
    model = view.model
    batches = list(prompts)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((int(b.attention_mask.sum(dim=1).max()) for b in batches), default=0)
    if new_tokens < 1 or (context is not None and longest + new_tokens > context):
        raise ValueError(
            f"prompts of up to {longest} tokens and new_tokens={new_tokens} do not fit a context of {context}; "
            "shorten the prompts, or ask for between 1 token and what is left"
        )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature is not None:  # from the model's whole distribution, whatever its generation config cuts off
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    answered = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), progress_bar(progress) as bar:
        torch.manual_seed(seed)
        task = bar.add_task("demonstrations", total=len(batches))
        for batch in batches:
            ids, real = _pad_left(batch.input_ids, batch.attention_mask.bool())
            whole = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=real.long().to(model.device),
                max_new_tokens=new_tokens,
                pad_token_id=0,
                **sampling,
            ).cpu()
            real = torch.cat([real, _before_end(whole[:, ids.shape[1] :], _end_tokens(model))], dim=1)
            ids, real = _pad_right(whole, real)
            answered.append(replace(batch, input_ids=ids, attention_mask=real.long()))
            bar.advance(task)
    return answered


def _end_tokens(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    return [] if end is None else end if isinstance(end, list) else [end]


def _before_end(written: Int[Tensor, "b t"], end: list[int]) -> Bool[Tensor, "b t"]:
    """Which of the written tokens stand before a row's first end token, or are it."""
    ends = torch.isin(written, torch.tensor(end, dtype=written.dtype)).long()
    return ends.cumsum(dim=1) - ends == 0


def _pad_left(ids: Int[Tensor, "b t"], real: Bool[Tensor, "b t"]) -> tuple[Int[Tensor, "b s"], Bool[Tensor, "b s"]]:
    """The real tokens at the right of as few columns as hold them: where `generate` goes on."""
    order = real.long().argsort(dim=1, stable=True)[:, ids.shape[1] - int(real.sum(dim=1).max()) :]
    return ids.gather(1, order), real.gather(1, order)


def _pad_right(ids: Int[Tensor, "b t"], real: Bool[Tensor, "b t"]) -> tuple[Int[Tensor, "b s"], Bool[Tensor, "b s"]]:
    """The real tokens at the left: a plain forward pass then counts positions from a row's first token."""
    order = real.long().argsort(dim=1, descending=True, stable=True)[:, : int(real.sum(dim=1).max())]
    return ids.gather(1, order), real.gather(1, order)
