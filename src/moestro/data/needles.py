"""Needles in haystacks: a fact with a random answer, hidden at many depths in texts of many lengths.

    needles = code_needles(tokenizer, 3)
    runs = needle_runs(tokenizer, texts, needles, lengths=(128, 256, 512), depths=10)

A prompt is put together from pieces that are tokenized one by one, so that it is known where the needle lies whatever
the tokenizer does at seams; all prompts of one length have exactly that many tokens. No token of an answer stands
anywhere else in its prompt: sentences of the haystack that hold one are left out.

"Retrieval Head Mechanistically Explains Long-Context Factuality" (arXiv:2404.15574).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.data.tasks import WORDS

MIN_ANSWER = 3
"""Different tokens of an answer: one or two are copied by accident, by a head that looks a fixed way back."""

_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)|(?<=[。！？\n])")


@dataclass(frozen=True)
class Needle:
    """A fact and the question that asks for it: the prompt ends in `question`, and the model is to go on with `answer`.

    The fact as it stands in the haystack is `before` + `answer` + `after`.
    """

    before: str
    answer: str
    after: str
    question: str


@dataclass(frozen=True)
class NeedleRun:
    """One prompt, and where its needle lies."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """Token ids of the answer."""
    needle: tuple[int, int]
    """First position of the needle in the prompt, and the one after its last."""
    depth: float
    """Asked for: 0 is the beginning of the haystack, 1 its end."""
    number: int
    """Which of the needles."""

    @property
    def length(self) -> int:
        return len(self.prompt)


def code_needles(
    tokenizer: Any,
    count: int,
    *,
    tokens: int = 5,
    before: str = " The code of {} is",
    after: str = ".",
    question: str = "\nThe code of {} is",
    words: Sequence[str] = WORDS,
    seed: int = 0,
) -> list[Needle]:
    """Facts that no model can know: a word's code, made of `tokens` other words, each one token with its space.

    Two thirds of the words that are one token serve in codes, the others as what has a code. Raises ValueError where
    the tokenizer has too few such words.
    """
    single = [word for word in words if len(_ids(tokenizer, f" {word}")) == 1]
    names, codes = single[::3], [word for i, word in enumerate(single) if i % 3]
    if len(names) < count or len(codes) < tokens:
        raise ValueError(
            f"{len(single)} of {len(words)} words are one token of this tokenizer: enough for {len(names)} needles of "
            f"{len(codes)} tokens, not for count={count} and tokens={tokens}; give more words"
        )
    rng = random.Random(f"needles-{seed}")
    return [
        Needle(before.format(name), "".join(f" {w}" for w in rng.sample(codes, tokens)), after, question.format(name))
        for name in rng.sample(names, count)
    ]


def needle_runs(
    tokenizer: Any,
    haystack: Iterable[str],
    needles: Sequence[Needle],
    *,
    lengths: Sequence[int],
    depths: int = 10,
    seed: int = 0,
) -> list[NeedleRun]:
    """Every needle at every length (tokens of the whole prompt) and at `depths` even depths from 0 to 1.

    A needle stands at the last end of a sentence that its depth has reached. Each needle and length has its own stretch
    of the haystack, the same for all depths. Raises ValueError for a needle whose answer has fewer than three different
    tokens, or one that stands in its question too, and for a haystack that is too short.
    """
    if depths < 1 or not lengths or not needles:
        raise ValueError(f"{len(needles)} needles, {len(lengths)} lengths and {depths} depths: each must be 1 or more")
    sentences = [
        ids for text in haystack for piece in _SENTENCE_END.split(text) if piece and (ids := _ids(tokenizer, piece))
    ]
    lead = list(tokenizer("")["input_ids"])
    rng = random.Random(f"haystack-{seed}")
    runs = []
    for number, needle in enumerate(needles):
        before, answer, after, question = (
            _ids(tokenizer, part) for part in (needle.before, needle.answer, needle.after, needle.question)
        )
        _check(needle, answer, [*lead, *before, *after, *question])
        usable = [ids for ids in sentences if not set(answer) & set(ids)]
        for length in lengths:
            room = length - len([*lead, *before, *answer, *after, *question])
            hay, ends = _stretch(usable, room, length, rng)
            for depth in (i / max(depths - 1, 1) for i in range(depths)):
                cut = room if depth == 1 else max(end for end in ends if end <= depth * room)
                start = len(lead) + cut
                prompt = [*lead, *hay[:cut], *before, *answer, *after, *hay[cut:], *question]
                end = start + len([*before, *answer, *after])
                runs.append(NeedleRun(tuple(prompt), tuple(answer), (start, end), depth, number))
    return runs


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _check(needle: Needle, answer: Sequence[int], rest: Sequence[int]) -> None:
    if len(set(answer)) < MIN_ANSWER:
        raise ValueError(
            f"the answer {needle.answer!r} has {len(set(answer))} different tokens; with fewer than {MIN_ANSWER} "
            "a head copies it by accident: give a longer one"
        )
    if shared := set(answer) & set(rest):
        raise ValueError(
            f"{len(shared)} of {len(set(answer))} tokens of the answer {needle.answer!r} stand in its question or "
            "beside it as well; choose words that do not"
        )


def _stretch(sentences: Sequence[list[int]], room: int, length: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """`room` tokens of consecutive sentences from a random one on, and where sentences end among them."""
    total = sum(map(len, sentences))
    if room < 1 or total < room:
        raise ValueError(
            f"length={length} leaves {room} tokens for the haystack, which has {total} in sentences without a token of "
            "the answer; " + ("ask for longer prompts" if room < 1 else "give more text, or ask for shorter prompts")
        )
    hay: list[int] = []
    ends = [0]
    at = rng.randrange(len(sentences))
    while len(hay) < room:
        hay += sentences[at % len(sentences)]
        ends.append(len(hay))
        at += 1
    return hay[:room], [end for end in ends if end <= room]
