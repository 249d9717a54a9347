"""Generated questions about clips (four moving objects of different colours) with a subtitle, and a sound as a third
source, of which it is known what they need: the clip, the subtitle, either, both, all three, or more than there is.

- *Answerers*: rules that read pixels, words and pitch and reply only where they know; and small transformers over a
  clip encoder, trained on other questions with sources left out at random. A source that is not given is left out of
  the question; the classifier then reads zeros and a flag.
- *Types*: of the trained answerer from its probability of the right choice, with the margin that lies half-way between
  guessing and knowing, 0.375 for four choices; stated before the first run, as all thresholds. Beside it, types from
  its best choice alone, as the paper takes them from one reply: a guess is right in one of four cases.
- *Permuted sources*: types found by one model, the cost measured on the next, trained from another seed. A source is
  replaced by that of another question with another answer, 5 draws. *Control*: the same with the types shuffled among
  the questions.
- *Baseline*: permutation importance, one number for each source of a set, on a set in which every question needs a
  single source and on one in which every question needs both.

± is the standard deviation over the models; the rows of intervals are 95% bootstrap intervals over questions, and
Wilson's for shares, the mean over the models of their ends. With three sources a question that two of them answer
alike, or that needs two of the three, is of no type by the paper's definition; its scores tell which (see the table).

In a first quick run every subtitle that said anything spoke of what was asked, so that the classifiers had no need to
read of what; permuted subtitles then cost 0.2 where they should not matter. Subtitles about other things, and questions
about things that are never shown, were added before the recorded run; nothing else was changed.

Not tried here: the shares of types in published benchmarks, agreement with people, video models, retrievers or adapters
as sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl

from moestro.analyze import modality_importance as mi
from moestro.analyze.questions import Question, probability
from moestro.evidence import video_questions as clips
from moestro.evidence.base import Claim, Evidence, Rows
from moestro.stats import proportion

TITLE = "Assessing Modality Bias in Video Question Answering Benchmarks with Multimodal Large Language Models"
ARXIV = "2408.12763"
CLAIM = (
    "Scoring every question with each subset of its sources tells which source carries the answer and whether it needs "
    "several; most questions of video benchmarks need one. Replacing the source that a question does not need costs "
    "other models next to nothing, replacing the one it needs costs them the answer."
)
SOURCES = (
    "analyze/questions.py",
    "analyze/modality_importance.py",
    "stats.py",
    "evidence/video_questions.py",
    "evidence/base.py",
)
QUICK = {"models": 2, "steps": 700, "questions": 120}
NOT_SHOWN: dict[str, str] = {}

# Thresholds, stated before the first run.
MARGIN = (1 - 1 / 4) / 2
AGREED = 0.8
LOW_COST, HIGH_COST = 0.05, 0.25
FEW_COMPLEMENTARY = 0.05

TWO, THREE = ("video", "subtitle"), clips.SOURCES
PLANTED_TWO = {
    "video": "video",
    "subtitle": "subtitle",
    "video or subtitle": mi.CORRECT,
    "video and subtitle": mi.COMPLEMENTARY,
    "unanswerable": mi.INCORRECT,
}
"""{what a question is planted to need: its type among two sources}"""
PLANTED_THREE = {
    "video": "video",
    "subtitle": "subtitle",
    "video or subtitle": mi.NONE,
    "video and subtitle": mi.NONE,
    "unanswerable": mi.INCORRECT,
    "sound": "sound",
    "any of three": mi.CORRECT,
    "all three": mi.COMPLEMENTARY,
}
RULES, TRAINED, BEST, CHANCE = "rules", "trained", "trained, one reply", "trained, types shuffled"

FOUND = "share of the questions whose planted type is found"
MEAN_MIS = "importance of each source, rules"
COST = "accuracy lost by permuting a source, by the type of the question"
ENDS = "95% intervals"
IMPORTANCE = "permutation importance: accuracy lost by permuting a source in a whole set"
SHARE = "share of complementary questions in a whole set"
ALONE = "accuracy without any source"


def run(*, models: int = 3, steps: int = 1500, questions: int = 600, progress: bool = True) -> Evidence:
    """Train the answerers, type the questions, permute sources, and hold the claims against what was measured."""
    rows = Rows()
    two = clips.generate(questions, [*PLANTED_TWO], seed=1)
    three = clips.generate(questions, [*PLANTED_THREE], seed=2)
    for sources, (asked, planted), wanted in ((TWO, two, PLANTED_TWO), (THREE, three, PLANTED_THREE)):
        scores = mi.ask_subsets(asked, clips.read, sources=sources, progress=progress)
        add_found(rows, f"{len(sources)} sources", RULES, mi.question_types(scores), [wanted[kind] for kind in planted])
    importance = mi.modality_importance(scores)
    for kind in PLANTED_THREE:
        mean = importance[np.array(planted) == kind].mean(axis=0)
        for source, value in zip(THREE, mean.tolist()):
            rows.add(MEAN_MIS, {"needed": kind, "source": source}, value)
    answerers = [clips.answerer(clips.train(seed, steps=steps, progress=progress)) for seed in range(models)]
    for number, answer in enumerate(answerers):
        types = typed(rows, answer, two, three, number, progress)
        permute(rows, two[0], types, answerers[(number + 1) % models], number, progress)
        whole_sets(rows, answer, two, progress)
    return Evidence(rows=list(rows), claims=claims(rows))


def typed(rows: Rows, answer, two, three, seed: int, progress: bool) -> list[str]:
    """Hold the trained answerer's types against the planted ones; returns those among two sources."""
    kept = []
    for sources, (asked, planted), wanted in ((TWO, two, PLANTED_TWO), (THREE, three, PLANTED_THREE)):
        setting, expected = f"{len(sources)} sources", [wanted[kind] for kind in planted]
        graded = mi.ask_subsets(asked, answer, sources=sources, score=probability, batch_size=256, progress=progress)
        types = mi.question_types(graded, margin=MARGIN)
        kept.append(types)
        add_found(rows, setting, TRAINED, types, expected)
        add_found(rows, setting, CHANCE, np.random.default_rng(seed).permutation(types).tolist(), expected)
        replies = mi.ask_subsets(asked, answer, sources=sources, batch_size=256, progress=progress)
        add_found(rows, setting, BEST, mi.question_types(replies), expected)
        rows.add(ALONE, {"set": setting}, float(replies.question_only.mean()))
    return kept[0]


def add_found(rows: Rows, sources: str, answerer: str, types: Sequence[str], expected: Sequence[str]) -> None:
    hits = sum(a == b for a, b in zip(types, expected))
    share = proportion(hits, len(types))
    rows.add(FOUND, {"sources": sources, "answerer": answerer}, share.estimate)
    add_ends(rows, f"{FOUND}: {sources}, {answerer}", share.low, share.high)


def add_ends(rows: Rows, of: str, low: float, high: float) -> None:
    for end, value in (("low", low), ("high", high)):
        rows.add(ENDS, {"of": of, "end": end}, value)


def permute(rows: Rows, asked: list[Question], types: list[str], answer, seed: int, progress: bool) -> None:
    """What the biased questions lose by either source; the control has the types shuffled."""
    shuffled = np.random.default_rng(seed).permutation(types).tolist()
    for label, given in (("as found", types), ("shuffled", shuffled)):
        drops = mi.permutation_drops(asked, answer, types=given, sources=TWO, batch_size=256, progress=progress)
        for row in drops.filter(pl.col("type").is_in(TWO)).iter_rows(named=True):
            setting = {"types": label, "type": row["type"], "permuted": row["source"]}
            rows.add(COST, setting, row["drop"])
            if row["low"] is not None:
                add_ends(
                    rows, f"cost, types {label}, biased to {row['type']}, {row['source']}", row["low"], row["high"]
                )


def whole_sets(rows: Rows, answer, two, progress: bool) -> None:
    """Two sets for which permutation importance says that both sources matter, and what the questions need."""
    for name, kinds in {"single": ("video", "subtitle"), "both": ("video and subtitle",)}.items():
        asked = [q for q, kind in zip(*two) if kind in kinds]
        drops = mi.permutation_drops(asked, answer, sources=TWO, batch_size=256, progress=progress)
        for row in drops.iter_rows(named=True):
            rows.add(IMPORTANCE, {"every question needs": name, "source": row["source"]}, row["drop"])
        scores = mi.ask_subsets(asked, answer, sources=TWO, score=probability, batch_size=256, progress=progress)
        count = mi.question_types(scores, margin=MARGIN).count(mi.COMPLEMENTARY)
        share = proportion(count, len(asked))
        rows.add(SHARE, {"every question needs": name}, share.estimate)
        add_ends(rows, f"{SHARE}: {name}", share.low, share.high)


def claims(rows: Rows) -> list[Claim]:
    """What the paper's claims come to here."""

    def cost(kind: str, permuted: str) -> float:
        setting = {"types": "as found", "type": kind, "permuted": permuted}
        return rows.mean(COST, setting) if any(r.metric == COST and r.setting == setting for r in rows) else math.nan

    def found(sources: str, answerer: str) -> float:
        return rows.mean(FOUND, {"sources": sources, "answerer": answerer})

    def importance(name: str) -> float:
        return min(rows.mean(IMPORTANCE, {"every question needs": name, "source": source}) for source in TWO)

    def share(name: str) -> float:
        return rows.mean(SHARE, {"every question needs": name})

    video, subtitle = TWO
    low, high = (video, subtitle), (video, video)
    stated: list[tuple[str, float, str, float]] = [
        ("planted types found by rules, two sources", found("2 sources", RULES), ">=", 1),
        ("planted types found by rules, three sources", found("3 sources", RULES), ">=", 1),
        ("planted types found by trained answerers, two sources", found("2 sources", TRAINED), ">=", AGREED),
        (
            "types from one reply lose to types from probabilities",
            found("2 sources", TRAINED) - found("2 sources", BEST),
            ">=",
            0,
        ),
        ("cost of permuting what is not needed, the larger of both", max(cost(*low), cost(*low[::-1])), "<=", LOW_COST),
        (
            "cost of permuting what is needed, the smaller of both",
            min(cost(*high), cost(subtitle, subtitle)),
            ">=",
            HIGH_COST,
        ),
        ("single-source questions: permutation importance, the smaller of both", importance("single"), ">=", HIGH_COST),
        ("single-source questions: share that is complementary", share("single"), "<=", FEW_COMPLEMENTARY),
        ("questions that need both: permutation importance, the smaller of both", importance("both"), ">=", HIGH_COST),
        ("questions that need both: share that is complementary", share("both"), ">=", 1 - FEW_COMPLEMENTARY),
    ]
    return [Claim(name=n, measured=m, relation=r, needed=t) for n, m, r, t in stated]  # type: ignore[arg-type]
