"""A small multimodal mixture-of-experts model over pictures of handwritten digits, and questions about them.

A picture of 8 x 8 pixels is 16 patches, each projected linearly to one token of a causal decoder, at the place where
the text says <image>. Three kinds of questions, with the answer one word:

    picture questions   "<image> which digit is it two five one nine"       four choices; no other text is needed
    text questions      "<image> how much is two plus five seven ..."       the picture does not matter; a grey one
    questions to both   "<image> is it larger than four", "<image> how much is it plus two ..."
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from torch import Tensor, nn

from moestro.analyze.questions import Question
from moestro.models.lm import MoELMConfig, MoELMForCausalLM
from moestro.tune.modality_robustness import (
    BOTH,
    IGNORED,
    IMAGE,
    IMAGE_HEAVY,
    NEITHER,
    TEXT,
    TEXT_HEAVY,
    ModalityBatch,
    answers,
)

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FACTS = (
    "honey keeps for years",
    "bees dance to talk",
    "granite is hard",
    "bamboo is a grass",
    "owls hunt at night",
    "salt was money once",
    "rust is old iron",
    "ice is lighter than water",
)
TRAINED_FACTS, TESTED_FACTS = FACTS[:4], FACTS[4:]
TRAINED_TEXTS = ("this picture seems to depict a {}", "the picture shows a {}", "here one can see a {}")
TESTED_TEXTS = ("i think it is a {}", "a photo of the number {}", "everyone says {}")
SCANNED_TEXTS = ("text found {0} page {0}", "sign reads {0} {0}")
GREY = np.full((8, 8), 0.5, dtype=np.float32)
"""The neutral picture of text questions."""

PICTURE, PLACES = "<image>", 16
_SENTENCES = (
    *FACTS,
    *TRAINED_TEXTS,
    *TESTED_TEXTS,
    *SCANNED_TEXTS,
    "which digit is it how much plus minus larger than",
)
WORDS = ("<pad>", "<start>", PICTURE, "yes", "no", *DIGITS)
WORDS += tuple(sorted({w for s in _SENTENCES for w in re.findall("[a-z]+", s)} - {*WORDS}))
NUMBER = {word: i for i, word in enumerate(WORDS)}
TEXT_IDS = tuple(i for i, word in enumerate(WORDS) if word != PICTURE)
"""Every id but the picture's: what an observer of image tokens skips."""


class Pictures(NamedTuple):
    images: Float[np.ndarray, "n 8 8"]
    digits: Int[np.ndarray, " n"]


@cache
def split(seed: int) -> tuple[Pictures, Pictures]:
    """1197 digits to learn from, and 600 to be tested on."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) / 16).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(labels))
    tested, learned = order[:600], order[600:]
    return Pictures(images[learned], labels[learned]), Pictures(images[tested], labels[tested])


def question(kind: int, pictures: Pictures, id: str, rng: np.random.Generator) -> Question:
    """One question of a kind, about one of the pictures."""
    which = int(rng.integers(len(pictures.digits)))
    image, digit = pictures.images[which], int(pictures.digits[which])
    if kind == IMAGE_HEAVY:
        return _choosing(id, "which digit is it", image, digit, rng)
    if kind == TEXT_HEAVY:
        a, b = int(rng.integers(10)), int(rng.integers(10))
        if a + b < 10:
            return _choosing(id, f"how much is {DIGITS[a]} plus {DIGITS[b]}", GREY, a + b, rng)
        a, b = max(a, b), min(a, b)
        return _choosing(id, f"how much is {DIGITS[a]} minus {DIGITS[b]}", GREY, a - b, rng)
    if rng.integers(2):
        than = int(rng.integers(9))
        text = f"{PICTURE} is it larger than {DIGITS[than]}"
        return Question(id, text, {"image": image}, ("yes", "no"), int(digit <= than))
    more = int(rng.integers(10 - digit))
    return _choosing(id, f"how much is it plus {DIGITS[more]}", image, digit + more, rng)


def _choosing(id: str, words: str, image: Any, right: int, rng: np.random.Generator) -> Question:
    others = [int(d) for d in rng.permutation(10) if d != right][:3]
    order = rng.permutation([right, *others]).tolist()
    choices = tuple(DIGITS[d] for d in order)
    return Question(id, f"{PICTURE} {words} {' '.join(choices)}", {"image": image}, choices, order.index(right))


def questions(kind: int, pictures: Pictures, count: int, seed: int) -> list[Question]:
    """`count` questions of a kind, the same for the same seed."""
    rng = np.random.default_rng([seed, kind])
    return [question(kind, pictures, f"{kind}-{i}", rng) for i in range(count)]


class DigitVLM(nn.Module):
    """A linear projector into a decoder whose feed-forward parts are mixtures of experts."""

    def __init__(self, hidden: int = 64):
        super().__init__()
        sizes: dict[str, Any] = dict(
            vocab_size=len(WORDS),
            hidden_size=hidden,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=hidden // 4,
            moe_intermediate_size=hidden,
            num_experts=8,
            num_experts_per_tok=2,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
        self.lm = MoELMForCausalLM(MoELMConfig(**sizes))
        self.projector = nn.Linear(4, hidden)
        self.place = nn.Parameter(torch.randn(PLACES, hidden) * 0.02)

    def get_decoder(self) -> nn.Module:
        return self.lm.model

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        pixels: Float[Tensor, "b 8 8"],
        attention_mask: Int[Tensor, "b t"],
        use_cache: bool = False,
    ) -> Any:
        patches = pixels.unflatten(1, (4, 2)).unflatten(3, (4, 2)).transpose(2, 3).reshape(-1, PLACES, 4)
        seen = self.projector(patches) + self.place
        embeds = self.lm.model.embed_tokens(input_ids)
        embeds = embeds.masked_scatter((input_ids == NUMBER[PICTURE])[:, :, None], seen.to(embeds.dtype))
        return self.lm(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=use_cache)


def collate(asked: Sequence[Question], kind: Sequence[int], origin: Sequence[int] | None = None) -> ModalityBatch:
    """Questions with their answers as rows, padded on the right."""
    rows = [[NUMBER["<start>"], *_ids(q.text), NUMBER[q.right]] for q in asked]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, len(row) - 1] = row[-1]
    modality = torch.where(ids == NUMBER[PICTURE], IMAGE, TEXT).masked_fill(ids <= NUMBER["<start>"], NEITHER)
    inputs = {
        "input_ids": ids,
        "pixels": torch.from_numpy(np.stack([q.sources["image"] for q in asked]).astype(np.float32)),
        "attention_mask": (ids != 0).long(),
    }
    own = range(len(rows)) if origin is None else origin
    return ModalityBatch(inputs, labels, modality, torch.tensor(kind), torch.tensor(list(own)))


def _ids(text: str) -> list[int]:
    words = text.lower().split()
    return [i for word in words for i in [NUMBER[word]] * (PLACES if word == PICTURE else 1)]


def answerer(model: DigitVLM, kind: int = BOTH) -> Any:
    """The model as a function of questions: its probability of each choice."""

    @torch.no_grad()
    def answer(asked: Sequence[Question]) -> list[list[float]]:
        logits = answers(model.eval(), collate(asked, [kind] * len(asked))).logits
        of = torch.tensor([[NUMBER[c] for c in (*q.choices, *q.choices)[:4]] for q in asked])
        chosen = logits.gather(1, of)
        return [row[: len(q.choices)].softmax(dim=0).tolist() for row, q in zip(chosen, asked)]

    return answer
