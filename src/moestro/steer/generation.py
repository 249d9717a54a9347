"""Generate text token by token, steered or not, as `moestro generate` and `moestro studio` do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TextStreamer

from moestro.steer.steering import Steering


class _Pieces(TextStreamer):
    """Hands each piece of text to a function as soon as it can no longer change."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


def prompt_ids(view: Any, prompt: str, *, chat: bool | None = None) -> Tensor:
    """Token ids [1, T] of a prompt. `chat`: as a user's message of the tokenizer's template; None: where it has one.

    Raises ValueError for an empty prompt, a model without a tokenizer, or `chat` without a template.
    """
    tokenizer = view.tokenizer
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer, so a prompt cannot be read; save one beside the model")
    if not prompt.strip():
        raise ValueError("the prompt is empty; give a text, or - to read it from standard input")
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise ValueError("the tokenizer has no chat template; leave out --chat")
    if template if chat is None else chat:
        messages = [{"role": "user", "content": prompt}]
        found = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return found["input_ids"].to(view.device)
    return tokenizer(prompt, return_tensors="pt")["input_ids"].to(view.device)


@torch.no_grad()
def generate(
    view: Any,
    prompt: str,
    *,
    steering: Sequence[Steering] = (),
    edits: Sequence[Any] = (),
    on_text: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool | None = None,
) -> str:
    """The continuation of a prompt; `on_text` is called with its pieces as they come. Temperature 0 is greedy.

    `stop` is asked after every token whether to leave it at that.

    Raises ValueError for bad settings or a steering setup of another model, before anything runs.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; generate 1 or more")
    if temperature < 0:
        raise ValueError(f"temperature={temperature}; give 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; it lies in (0, 1]")
    for setup in steering:
        setup.check(view)
    ids = prompt_ids(view, prompt, chat=chat)
    limit = getattr(view.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] >= limit:
        raise ValueError(f"the prompt has {ids.shape[1]} tokens, and the model reads at most {limit}; shorten it")
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - ids.shape[1])
    settings: dict[str, Any] = dict(max_new_tokens=max_new_tokens, do_sample=temperature > 0, num_beams=1)
    if temperature > 0:
        settings |= dict(temperature=temperature, top_p=top_p, top_k=0)
        torch.manual_seed(seed)
    pieces: list[str] = []

    def take(text: str) -> None:
        pieces.append(text)
        if on_text is not None:
            on_text(text)

    with ExitStack() as steered:
        processors = LogitsProcessorList()
        for setup in steering:
            processors += steered.enter_context(setup.on(view))
        steered.enter_context(view.edits(*edits))
        view.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=_padding(view),
            logits_processor=processors,
            streamer=_Pieces(view.tokenizer, take),
            stopping_criteria=[] if stop is None else [lambda ids, scores: torch.full((len(ids),), stop())],
            **settings,
        )
    return "".join(pieces)


def _padding(view: Any) -> int | None:
    """A padding token, so that transformers does not warn; nothing is padded here."""
    for holder in (view.tokenizer, view.model.generation_config):
        if getattr(holder, "pad_token_id", None) is not None:
            return holder.pad_token_id
    eos = view.model.generation_config.eos_token_id
    return eos[0] if isinstance(eos, list) else eos
