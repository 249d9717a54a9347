"""Arithmetic in sentences of five languages: problems, and a language model fine-tuned on them, mostly in English."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

ENGLISH = "en"
TEMPLATES = {
    "en": ("{} plus {} is", "{} minus {} is", "the larger of {} and {} is", "the smaller of {} and {} is"),
    "de": (
        "{} und {} ergibt",
        "{} weniger {} ergibt",
        "die größere von {} und {} ist",
        "die kleinere von {} und {} ist",
    ),
    "fr": (
        "{} ajouté à {} donne",
        "{} moins {} donne",
        "le plus grand de {} et {} est",
        "le plus petit de {} et {} est",
    ),
    "es": ("la suma de {} y {} es", "{} menos {} es", "el mayor de {} y {} es", "el menor de {} y {} es"),
    "pl": ("{} dodać {} to", "{} odjąć {} to", "większa z liczb {} i {} to", "mniejsza z liczb {} i {} to"),
}
OTHERS = tuple(language for language in TEMPLATES if language != ENGLISH)
ENGLISH_SHARE = 0.9
BELOW = 100
HELD_OUT = 0.15
ROWS, RATE, WARMUP = 32, 5e-4, 20


class Problem(NamedTuple):
    """Operation number `kind` on two different numbers; a difference is positive."""

    kind: int
    a: int
    b: int

    @property
    def answer(self) -> int:
        return (self.a + self.b, self.a - self.b, max(self.a, self.b), min(self.a, self.b))[self.kind]

    def prompt(self, language: str) -> str:
        return TEMPLATES[language][self.kind].format(self.a, self.b)


def problems() -> tuple[list[Problem], list[Problem]]:
    """All problems in a fixed random order, in two parts: to train on, and never trained on in any language."""
    numbers = [(a, b) for a in range(BELOW) for b in range(BELOW) if a != b]
    found = [Problem(kind, a, b) for kind in range(4) for a, b in numbers if kind != 1 or a > b]
    random.Random(0).shuffle(found)
    held_out = int(HELD_OUT * len(found))
    return found[held_out:], found[:held_out]


def encoded(tokenizer: Any, language: str, some: Sequence[Problem]) -> list[tuple[Tensor, Tensor]]:
    """(ids [T], targets [T]) of each: prompt and answer to the end of the line, targets only in the answer."""
    pairs = []
    for problem in some:
        prompt = tokenizer(problem.prompt(language))["input_ids"]
        answer = tokenizer(f" {problem.answer}\n", add_special_tokens=False)["input_ids"]
        pairs.append((torch.tensor(prompt + answer), torch.tensor([-100] * len(prompt) + answer)))
    return pairs


def _predicted(model: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [M, V], targets [M], row [M]) of the answers' M tokens, in a batch padded on the right."""
    ids, targets = (pad_sequence(list(part), batch_first=True, padding_value=-100) for part in zip(*pairs, strict=True))
    mask = (ids != -100).long()
    hidden = model.base_model(input_ids=ids.clamp_min(0), attention_mask=mask, use_cache=False).last_hidden_state
    row, place = (targets[:, 1:] != -100).nonzero(as_tuple=True)
    return model.get_output_embeddings()(hidden[row, place]), targets[row, place + 1], row


def fine_tune(view: Any, train: Sequence[Problem], *, steps: int, seed: int) -> None:
    """AdamW on the answers, rate falling linearly to 0; 90% of a batch's problems are English."""
    draw = random.Random(seed)
    optimiser = torch.optim.AdamW(view.model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    view.model.train()
    for step in range(steps):
        languages = [ENGLISH if draw.random() < ENGLISH_SHARE else draw.choice(OTHERS) for _ in range(ROWS)]
        batch = [encoded(view.tokenizer, language, [draw.choice(train)])[0] for language in languages]
        optimiser.param_groups[0]["lr"] = RATE * min((step + 1) / WARMUP, 1) * (1 - step / steps)
        logits, targets, _ = _predicted(view.model, batch)
        F.cross_entropy(logits, targets).backward()
        torch.nn.utils.clip_grad_norm_(view.model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    view.model.eval()


@torch.no_grad()
def answers(view: Any, language: str, some: Sequence[Problem]) -> tuple[NDArray, NDArray]:
    """For each problem: 1 where greedy decoding writes exactly the answer, else 0; and the loss per answer token."""
    logits, targets, row = _predicted(view.model, encoded(view.tokenizer, language, some))
    right, loss = logits.argmax(dim=-1) == targets, F.cross_entropy(logits, targets, reduction="none")
    count = row.bincount()
    exact = torch.bincount(row, weights=right.double()) == count  # each token is the best after the right ones
    return exact.double().numpy(), (torch.bincount(row, weights=loss.double()) / count).numpy()
