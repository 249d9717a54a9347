"""Prompts with known answers, tried under one edit after another: what steering methods learn from and are judged by.

    loss(x, y) = mean over y's tokens of -log p(y_t | x, y_<t)

An edit that acts from the last prompt token on changes nothing before it, so that part is run once and kept as a KV
cache. Shapes: B prompts, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moestro.view.edit import Edit
from moestro.view.heads import HeadEdit
from moestro.view.observe import progress_bar

Prompt = str | Sequence[int]
"""A text, for the view's tokenizer, or token ids."""
BATCH = 16


class Judged(NamedTuple):
    """Known answers under some routing."""

    loss: Float[Tensor, " s"]
    """Mean over each answer's tokens, nats."""
    right: Bool[Tensor, " s"]
    """Whether greedy decoding gives the answer."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter asks for a gradient, so none is worked out below the first layer that is edited."""
    asking = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def token_ids(view: Any, prompts: Sequence[Prompt], *, special: bool = True) -> list[list[int]]:
    """Ids of every prompt. Raises ValueError for one without a token, or texts where the view has no tokenizer."""
    if any(isinstance(p, str) for p in prompts) and view.tokenizer is None:
        raise ValueError("the model was opened without a tokenizer: give token ids, or moestro.open(..., tokenizer=)")
    found = [
        view.tokenizer(p, add_special_tokens=special, verbose=False)["input_ids"]
        if isinstance(p, str)
        else [*map(int, p)]
        for p in prompts
    ]
    if empty := [number for number, ids in enumerate(found) if not ids]:
        raise ValueError(f"text {empty[0]} of {len(found)} holds no token")
    return found


def aligned(view: Any, prompts: Sequence[str], answers: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of both. A space that is a token of its own goes from the answer to its prompt.

    So the last prompt token is the one after which the answer has to be known.
    """
    asked, known = pairs(view, prompts, answers)
    for prompt, answer in zip(asked, known, strict=True):
        if len(answer) > 1 and view.tokenizer.decode(answer[:1]) == " ":
            prompt.append(answer.pop(0))
    return asked, known


def padded(rows: Sequence[Sequence[int]], side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """(ids, mask) [B, T] of rows of different lengths."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask


class Answered:
    """Prompts and their answers, ready to be tried with one edit after another.

    A try runs the last prompt token and the answer alone. Prompts are padded on the left and answers on the right.
    """

    def __init__(self, view: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]):
        self.view = view
        self.lengths = torch.tensor([len(p) for p in prompts])
        (before, before_mask), (after, after_mask) = padded(prompts, "left"), padded(answers, "right")
        device = view.device
        ids, mask = torch.cat([before, after], dim=1), torch.cat([before_mask, after_mask], dim=1)
        position = (mask.cumsum(dim=1) - 1).clamp_min(0)
        self._start = before.shape[1] - 1
        self._mask = mask[:, :-1].to(device)
        self._inputs = ids[:, self._start : -1].to(device)
        self._position = position[:, self._start : -1].to(device)
        self._target = after.to(device)
        self._real = after_mask.bool().to(device)
        self._cache: Any = None
        if self._start:
            with torch.no_grad():
                self._cache = view.stack(
                    input_ids=ids[:, : self._start].to(device),
                    attention_mask=self._mask[:, : self._start],
                    position_ids=position[:, : self._start].to(device),
                    use_cache=True,
                ).past_key_values

    def losses(self, *edits: Edit | HeadEdit) -> tuple[Float[Tensor, " b"], Bool[Tensor, " b"]]:
        """(mean loss of each answer's tokens, whether greedy decoding would give the answer) under the edits."""
        with self.view.edits(*edits):
            logits = self.view.model(
                input_ids=self._inputs,
                attention_mask=self._mask,
                position_ids=self._position,
                past_key_values=deepcopy(self._cache),  # the model appends to what it is given
                use_cache=self._cache is not None,
            ).logits.float()
        loss = F.cross_entropy(logits.transpose(1, 2), self._target, reduction="none") * self._real
        right = ((logits.argmax(dim=2) == self._target) | ~self._real).all(dim=1)
        return (loss.sum(dim=1) / self._real.sum(dim=1)).cpu(), right.cpu()


@torch.no_grad()
def judge(
    view: Any,
    prompts: Sequence[Prompt],
    answers: Sequence[Prompt],
    edit: Callable[[slice], Edit | HeadEdit] | None = None,
    *,
    batch_size: int = BATCH,
    progress: bool = True,
) -> Judged:
    """The answers' losses and whether they are given: as the model is, or with `edit(rows)` of the prompts in a batch.

    Every edit must leave what comes before the last prompt token alone.
    """
    asked, known = pairs(view, prompts, answers)
    losses, right = [], []
    with progress_bar(progress) as bar:
        task = bar.add_task("answers", total=len(asked))
        for start in range(0, len(asked), batch_size):
            rows = slice(start, start + batch_size)
            edits = [] if edit is None else [edit(rows)]
            loss, hit = Answered(view, asked[rows], known[rows]).losses(*edits)
            losses.append(loss)
            right.append(hit)
            bar.advance(task, len(loss))
    return Judged(torch.cat(losses), torch.cat(right))


def pairs(view: Any, prompts: Sequence[Prompt], answers: Sequence[Prompt]) -> tuple[list[list[int]], list[list[int]]]:
    if len(prompts) != len(answers) or not len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(answers)} answers; give one answer to each")
    return token_ids(view, prompts), token_ids(view, answers, special=False)


def by_length(ids: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Batches of row numbers, longest first: little padding."""
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))
