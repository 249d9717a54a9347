"""Which source carries the answer of each question, which questions need several, and what a whole set consists of.

Of a question with sources m_1..m_k every non-empty subset S is asked, and its reply scored with c_S in [0, 1]:

    MIS_j = mean of c_S over S with m_j and at least one other source  -  mean of c_S over non-empty S without m_j

    biased to m_j    MIS_i <= 0 <= MIS_j and MIS_i != MIS_j for every other i
    complementary    MIS_j > 0 for every j
    agnostic         MIS_j = 0 for every j: correct where every c_S = 1, incorrect where every c_S = 0

The singleton {m_j} is in neither mean, and so is the question without any source, which is asked beside them: answers
that can be told from the question alone look agnostic. With graded scores, or sampled replies, a score counts as 1 from
1 - `margin` and as 0 up to margin, and MIS as 0 where |MIS| <= margin / (2^(K-1) - 1), which is what one subset of the
mean can make of it; a margin of 0 is the paper's.

"Assessing Modality Bias in Video Question Answering Benchmarks with Multimodal Large Language Models"
(arXiv:2408.12763); margins, repeated questions and samples of the subsets are ours. Shapes: Q questions, K sources,
S subsets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int

from moestro.analyze.questions import DEFAULT_BATCH_SIZE, Answerer, Question, Score, ask, check, exact
from moestro.stats import Interval, bootstrap, difference, proportion

COMPLEMENTARY, CORRECT, INCORRECT = "complementary", "agnostic, correct", "agnostic, incorrect"
AGNOSTIC, NONE = "agnostic", "none"
"""`AGNOSTIC`: no source matters, and the subsets are neither all right nor all wrong."""
TYPES = (COMPLEMENTARY, CORRECT, INCORRECT, AGNOSTIC, NONE)
"""Beside one type for each source, which has the source's name."""
MOST_SOURCES = 6  # 63 subsets; above, subsets are sampled on demand only


@dataclass(frozen=True)
class SubsetScores:
    """What every question scored with every subset of its sources."""

    sources: tuple[str, ...]
    ids: tuple[str, ...]
    members: Bool[np.ndarray, "s k"]
    """Which sources each subset holds."""
    scores: Float[np.ndarray, "q s"]
    question_only: Float[np.ndarray, " q"]
    """The score without any source."""
    sampled: bool
    """Whether the subsets are a sample, and importance an estimate."""

    def of(self, *names: str) -> Float[np.ndarray, " q"]:
        """The scores with these sources. Raises ValueError where that subset was not asked."""
        wanted = np.isin(self.sources, names)
        found = (self.members == wanted).all(axis=1).nonzero()[0]
        if set(names) - set(self.sources) or not len(found):
            raise ValueError(f"the subset {sorted(names)} of the sources {list(self.sources)} was not asked")
        return self.scores[:, found[0]]


def ask_subsets(
    questions: Sequence[Question],
    answer: Answerer,
    *,
    sources: Sequence[str] | None = None,
    score: Score = exact,
    repeats: int = 1,
    max_subsets: int | None = None,
    cache: str | Path | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    seed: int = 0,
    progress: bool = True,
) -> SubsetScores:
    """Ask every question with every subset of its sources, and without any: 2^K calls each.

    `repeats`: ask so often, from the second time on with the choices in another order (the same for all subsets), and
    average. `max_subsets`: ask a random sample of the subsets. `cache`: a file that keeps scores by the questions' ids,
    so that asking goes on where it stopped; name another file for another model, score or set of questions.

    Raises:
        ValueError: fewer than two sources, more than MOST_SOURCES without `max_subsets`, a question that lacks one, a
            score outside [0, 1], or a cache that was made otherwise.
    """
    names = tuple(questions[0].sources if sources is None and questions else sources or ())
    check(questions, names)
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; ask at least once")
    if clash := set(names) & set(TYPES):
        raise ValueError(
            f"a source cannot be called {clash.pop()!r}, which is a type of question; give it another name"
        )
    members = _subsets(names, max_subsets, seed)
    rows = [(), *(tuple(n for n, m in zip(names, row) if m) for row in members)]
    ids = [q.id for q in questions]
    with _Cache(cache, dict(sources=names, repeats=repeats, seed=seed)) as kept:
        asked = [(row, repeat) for repeat in range(repeats) for row in rows]
        for row, repeat in asked:
            missing = [q for q in questions if (q.id, row, repeat) not in kept.scores]
            batch = [(q.shuffled(seed + repeat) if repeat else q).only(row) for q in missing]
            words = f"asking with {' + '.join(row) or 'the question alone'}"
            for q, reply in ask(batch, answer, batch_size=batch_size, description=words, progress=progress):
                value = float(score(q, reply))
                if not 0 <= value <= 1:
                    raise ValueError(f"a score of {value} for question {q.id!r}; scores must lie from 0 to 1")
                kept.add((q.id, row, repeat), value)
        table = np.array([[[kept.scores[i, row, r] for r in range(repeats)] for row in rows] for i in ids]).mean(axis=2)
    sampled = len(members) < 2 ** len(names) - 1
    return SubsetScores(names, tuple(ids), members, table[:, 1:], table[:, 0], sampled)


def _subsets(names: tuple[str, ...], most: int | None, seed: int) -> Bool[np.ndarray, "s k"]:
    """All non-empty subsets, the small ones first, or a sample that gives every source both of its families."""
    count = len(names)
    if count < 2 or len(set(names)) < count:
        raise ValueError(f"importance among the sources {list(names)} means nothing; give two different ones or more")
    if most is None and count > MOST_SOURCES:
        raise ValueError(
            f"{count} sources have {2**count - 1} subsets, each a call for every question; give max_subsets= to ask a "
            f"sample, or at most {MOST_SOURCES} sources"
        )
    if most is None or most >= 2**count - 1:
        every = chain.from_iterable(combinations(range(count), size) for size in range(1, count + 1))
        return np.array([[j in subset for j in range(count)] for subset in every])
    rng = np.random.default_rng(seed)
    for _ in range(100):
        chosen: set[int] = set()
        while len(chosen) < most:
            chosen.add(int(rng.integers(1, 2**count)))
        members = np.array([[number >> j & 1 for j in range(count)] for number in sorted(chosen)], dtype=bool)
        with_others, without = _families(members)
        if with_others.any(axis=0).all() and without.any(axis=0).all():
            return members
    raise ValueError(f"max_subsets={most} is too few to see each of {count} sources with and without; give more")


def _families(members: Bool[np.ndarray, "s k"]) -> tuple[Bool[np.ndarray, "s k"], Bool[np.ndarray, "s k"]]:
    """For each source: the subsets with it and at least one other, and those without it."""
    return members & (members.sum(axis=1, keepdims=True) >= 2), ~members


def modality_importance(scores: SubsetScores) -> Float[np.ndarray, "q k"]:
    """MIS of every question and source, from -1 (it interferes) to 1 (without it there is no answer)."""
    with_others, without = (scores.scores @ f / f.sum(axis=0) for f in _families(scores.members))
    return with_others - without


def question_types(scores: SubsetScores, *, margin: float = 0.0) -> list[str]:
    """The type of every question: the name of the source it is biased to, or one of TYPES.

    A margin suits graded scores: half of what knowing adds to guessing, (1 - 1 / choices) / 2, for probabilities.
    Raises ValueError unless 0 <= margin < 1/2.
    """
    if not 0 <= margin < 0.5:
        raise ValueError(f"margin={margin}; it must be 0 or more and less than 0.5, where a score is neither 0 nor 1")
    importance = modality_importance(scores)
    margin += 1e-9  # rounding of the means over subsets
    subsets = np.maximum(*(family.sum(axis=0) for family in _families(scores.members)))
    importance = np.where(np.abs(importance) <= margin / subsets, 0.0, importance)
    return [_type(row, c, scores.sources, margin) for row, c in zip(importance, scores.scores)]


def _type(mis: Float[np.ndarray, " k"], c: Float[np.ndarray, " s"], sources: tuple[str, ...], margin: float) -> str:
    if (mis == 0).all():
        return CORRECT if (c >= 1 - margin).all() else INCORRECT if (c <= margin).all() else AGNOSTIC
    if (mis > 0).all():
        return COMPLEMENTARY
    for j, name in enumerate(sources):
        others = np.delete(mis, j)
        if (others <= 0).all() and mis[j] >= 0 and (others != mis[j]).all():
            return name
    return NONE


def mean_importance(scores: SubsetScores) -> dict[str, Interval]:
    """{source: its mean MIS over the questions, with the bootstrap interval}, the most important first."""
    columns = {name: bootstrap(mis) for name, mis in zip(scores.sources, modality_importance(scores).T)}
    return dict(sorted(columns.items(), key=lambda item: -item[1].estimate))


def modality_report(types: Sequence[str], *, groups: Sequence[str] | None = None) -> pl.DataFrame:
    """Share of each type, in all and by group: columns group, type, questions, share, low, high (95%).

    A type that does not occur in a group but does elsewhere has a row there: a share of 0 has an upper limit too.
    """
    if not types:
        raise ValueError("there are no types to report: ask questions first")
    if groups is not None and len(groups) != len(types):
        raise ValueError(f"{len(groups)} groups for {len(types)} questions; give one each")
    parts = {"all": list(types)}
    for name in sorted(set(groups or ())):
        parts[name] = [t for t, g in zip(types, groups or ()) if g == name]
    rows = []
    for group, members in parts.items():
        for kind in sorted(set(types)):
            share = proportion(count := members.count(kind), len(members))
            rows.append((group, kind, count, share.estimate, share.low, share.high))
    return pl.DataFrame(rows, schema=["group", "type", "questions", "share", "low", "high"], orient="row")


def permutation_drops(
    questions: Sequence[Question],
    answer: Answerer,
    *,
    types: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    score: Score = exact,
    seeds: int = 5,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: bool = True,
) -> pl.DataFrame:
    """What each type of question loses where one source is another question's: does the type foretell what matters?

    The other question is drawn anew for each seed among those with another answer. Columns: type, source, questions,
    original, permuted, drop, low, high (95%, over questions; null for a single one). Without `types` all questions are
    one, "all": permutation importance (Gat et al., arXiv:2110.14375), which is one number for each source of a set.

    Raises ValueError for fewer than two questions, or where all have the same answer.
    """
    names = tuple(questions[0].sources if sources is None and questions else sources or ())
    check(questions, names)
    if types is not None and len(types) != len(questions):
        raise ValueError(f"{len(types)} types for {len(questions)} questions; give one each")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}; permute at least once")
    draws = [donors(questions, seed) for seed in range(seeds)]

    def scored(asked: Sequence[Question], words: str) -> Float[np.ndarray, " q"]:
        replies = ask(asked, answer, batch_size=batch_size, description=words, progress=progress)
        return np.array([score(q, reply) for q, reply in replies])

    original = scored([q.only(names) for q in questions], "asking")
    rows = []
    for name in names:
        swapped = [
            [q.only(names).given(name, questions[d].sources[name]) for q, d in zip(questions, drawn.tolist())]
            for drawn in draws
        ]
        permuted = np.mean([scored(asked, f"permuting {name}") for asked in swapped], axis=0)
        for kind in sorted(set(types)) if types is not None else ["all"]:
            own = np.array([types is None or t == kind for t in types or questions])
            drop = difference(original[own], permuted[own]) if own.sum() > 1 else None
            means = original[own].mean(), permuted[own].mean(), (original - permuted)[own].mean()
            rows.append(
                (kind, name, int(own.sum()), *map(float, means), *((drop.low, drop.high) if drop else (None,) * 2))
            )
    columns = ["type", "source", "questions", "original", "permuted", "drop", "low", "high"]
    return pl.DataFrame(rows, schema=columns, orient="row")


def donors(questions: Sequence[Question], seed: int) -> Int[np.ndarray, " q"]:
    """For every question another one with another answer, at random. Raises ValueError where there is none."""
    if len(questions) < 2:
        raise ValueError(f"{len(questions)} question has no other to take a source from; give two or more")
    known: dict[str, int] = {}
    answers = np.array([known.setdefault(repr(q.right), len(known)) for q in questions])
    if len(known) < 2:
        raise ValueError(
            f"all {len(questions)} questions have the answer {questions[0].right!r}: permuted sources "
            "would say the same; give questions with several answers"
        )
    rng = np.random.default_rng(seed)
    drawn = np.arange(len(questions))
    while len(same := (answers[drawn] == answers).nonzero()[0]):
        drawn[same] = rng.integers(len(questions), size=len(same))
    return drawn


Call = tuple[str, tuple[str, ...], int]
"""(question's id, sources it was asked with, repeat)"""


class _Cache:
    """Scores by call, appended to a file of JSON lines as they come; a line cut off by an interruption is dropped."""

    def __init__(self, path: str | Path | None, made: dict):
        self.scores: dict[Call, float] = {}
        self._path = None if path is None else Path(path)
        self._made = json.loads(json.dumps(made))
        self._file: IO[str] | None = None

    def __enter__(self) -> _Cache:
        if self._path is not None:
            lines = [*self._whole_lines()]
            if lines and lines[0] != self._made:
                raise ValueError(f"{self._path} was made with {lines[0]}, not {self._made}; name another file")
            self.scores = {(id, tuple(row), repeat): score for id, row, repeat, score in lines[1:]}
            self._file = self._path.open("a", encoding="utf-8")
            if not lines:
                self._write(self._made)
        return self

    def _whole_lines(self) -> Iterator:
        assert self._path is not None
        if self._path.exists():
            whole, _, cut = self._path.read_text(encoding="utf-8").rpartition("\n")
            if cut:
                self._path.write_text(whole + "\n" if whole else "", encoding="utf-8")
            yield from map(json.loads, whole.splitlines())

    def add(self, call: Call, score: float) -> None:
        self.scores[call] = score
        self._write([*call, score])

    def _write(self, line: object) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
