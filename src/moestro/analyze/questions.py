"""Questions with several input sources, and how a model's replies to them are scored.

A question holds its sources by name (a picture, a transcript, what a retriever found). The model is any function of a
list of questions that gives one reply each; a source it shall not see is not in the question at all, so that nothing
hints at it.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moestro.view.observe import progress_bar

DEFAULT_BATCH_SIZE = 64


@dataclass(frozen=True, eq=False)
class Question:
    """One question. `choices` is empty where the answer is free text."""

    id: str
    text: str
    sources: Mapping[str, Any]
    choices: tuple[Any, ...]
    answer: Any
    """Number of the right choice; without choices, whatever the score compares with."""

    @property
    def right(self) -> Any:
        """The right answer itself."""
        return self.choices[self.answer] if self.choices else self.answer

    def only(self, names: Collection[str]) -> Question:
        """The question without the other sources."""
        return replace(self, sources={name: value for name, value in self.sources.items() if name in names})

    def given(self, name: str, value: Any) -> Question:
        """The question with another (or a further) source."""
        return replace(self, sources={**self.sources, name: value})

    def shuffled(self, seed: int) -> Question:
        """The choices in another order, which hangs on the seed and the question's id alone."""
        order = np.random.default_rng([seed, zlib.crc32(self.id.encode())]).permutation(len(self.choices)).tolist()
        if not order:
            return self
        return replace(self, choices=tuple(self.choices[i] for i in order), answer=order.index(self.answer))


Answerer = Callable[[Sequence[Question]], Sequence[Any]]
"""A model: one reply for each question, the number of a choice or one probability for each choice (or a text)."""
Score = Callable[[Question, Any], float]
"""How good a reply is, from 0 to 1."""


def exact(question: Question, reply: Any) -> float:
    """1 for the right choice, else 0. Probabilities count by their largest."""
    return float(decision(reply) == question.answer)


def probability(question: Question, reply: Sequence[float]) -> float:
    """The probability that the reply gives the right choice: a guess counts as one, not as a hit now and then."""
    return float(reply[question.answer])


def decision(reply: Any) -> Any:
    """The choice of a reply: itself, or the largest of its probabilities."""
    return int(np.argmax(reply)) if np.ndim(reply) and not isinstance(reply, str) else reply


def check(questions: Sequence[Question], sources: Collection[str]) -> None:
    """Raise ValueError unless there are questions, with ids of their own, that all have the sources."""
    if not questions:
        raise ValueError("there are no questions to ask")
    twice = [id for id, count in Counter(q.id for q in questions).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} ids are those of several questions, as {twice[0]!r}; give each its own")
    for question in questions:
        if lacking := [name for name in sources if name not in question.sources]:
            raise ValueError(
                f"question {question.id!r} has no source {lacking[0]!r}, only {sorted(question.sources)}; leave the "
                "question out, or name the sources that all questions have"
            )


def ask(
    questions: Sequence[Question],
    answer: Answerer,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    description: str = "asking",
    progress: bool = True,
) -> Iterator[tuple[Question, Any]]:
    """Every question with its reply, asked in batches. Raises ValueError where a batch gets fewer replies or more."""
    with progress_bar(progress) as bar:
        task = bar.add_task(description, total=len(questions))
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            replies = answer(batch)
            if len(replies) != len(batch):
                raise ValueError(f"{len(replies)} replies to {len(batch)} questions; the model must reply to each")
            yield from zip(batch, replies)
            bar.advance(task, len(batch))
