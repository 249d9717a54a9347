"""Does a model change its answer because of an input that should not matter, and by how much?

The source that a question needs is kept, and the other one is intervened on:

    picture questions   random facts, or a sentence that names a wrong choice, before the question
    text questions      random pixels, black, white, or an unrelated picture in the place of the picture

    change rate   mean of 1[a != a']           a, a': the choices without and with the intervention
    divergence    mean of JS(p || p'), nats    p, p': the probabilities of the choices

"Diagnosing and Mitigating Modality Interference in Multimodal Large Language Models" (arXiv:2505.19616). Ours: the
controls (the same question asked again; a sentence that names the right choice), how often the named choice is
followed, and how far the routing of the tokens that were left alone moves. Shapes: Q questions, S texts, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from moestro.analyze.profiles import Profiles
from moestro.analyze.questions import DEFAULT_BATCH_SIZE, Answerer, Question, ask, check, decision
from moestro.stats import Interval, bootstrap, difference

Picture = Shaped[np.ndarray, "..."]

FACTS = (
    "Water boils at a lower temperature on high mountains.",
    "Honey keeps for years in a closed jar.",
    "The Danube flows through ten countries.",
    "Bees dance to tell each other where flowers are.",
    "Granite is harder than marble.",
    "The first trains ran on wooden rails.",
    "Octopuses have three hearts.",
    "Paper was made from rags before it was made from wood.",
    "Sound travels faster in water than in air.",
    "Bamboo is a grass.",
    "The Moon always shows the same side.",
    "Salt was once used to pay soldiers.",
    "Owls cannot move their eyes.",
    "Rust is iron and oxygen.",
)
FACT_COUNT = 10  # the paper's
MISLEADING = ("This picture seems to depict a {}.", "The picture shows a {}.", "Here one can see a {}.")
SCANNED = ("Text found in the picture: {0} / No. 4471 / {0} / open 9-18", "[scan] {0} {0} total {0} page 2")
"""What a reader of printed text might have left behind: a kind of text that no training on the others has seen."""


class Perturbed(NamedTuple):
    """A question after an intervention, and the choice that the intervention speaks for, if any."""

    question: Question
    towards: int | None = None


Perturbation = Callable[[Question, np.random.Generator], Perturbed]


def text_perturbations(
    *,
    facts: Sequence[str] = FACTS,
    fact_count: int = FACT_COUNT,
    misleading: Sequence[str] = MISLEADING,
    scanned: Sequence[str] = SCANNED,
) -> dict[str, Perturbation]:
    """For questions about a picture, whose text should not sway the answer; templates have a {} for the choice.

    "unrelated", "misleading"; "scanned", for a kind of text apart from those; "agreeing", which names the right choice:
    a control that tells the words from what they say.
    """
    if not 1 <= fact_count <= len(facts):
        raise ValueError(f"fact_count={fact_count} of {len(facts)} facts; draw 1 to {len(facts)}")

    def unrelated(question: Question, rng: np.random.Generator) -> Perturbed:
        chosen = rng.choice(len(facts), fact_count, replace=False).tolist()
        return Perturbed(_after(" ".join(facts[i] for i in chosen), question))

    def saying(templates: Sequence[str], *, right: bool = False) -> Perturbation:
        def perturb(question: Question, rng: np.random.Generator) -> Perturbed:
            named = question.answer if right else wrong_choice(question, rng)
            text = templates[int(rng.integers(len(templates)))].format(question.choices[named])
            return Perturbed(_after(text, question), named)

        return perturb

    return {
        "unrelated": unrelated,
        "misleading": saying(misleading),
        "scanned": saying(scanned),
        "agreeing": saying(misleading, right=True),
    }


def _after(text: str, question: Question) -> Question:
    return replace(question, text=f"{text} {question.text}")


def wrong_choice(question: Question, rng: np.random.Generator) -> int:
    """A choice that is not the right one. Raises ValueError where there is none."""
    wrong = [i for i, choice in enumerate(question.choices) if choice != question.right]
    if not wrong:
        raise ValueError(
            f"question {question.id!r} has no wrong choice among {list(question.choices)}, so no text can mislead; "
            "give questions with two choices or more"
        )
    return int(rng.choice(wrong))


def picture_perturbations(*, pictures: Sequence[Any] = (), source: str = "image") -> dict[str, Perturbation]:
    """For questions about a text, whose picture should not sway the answer: arrays of pixels in the source `source`.

    "random pixels", "black", "white", "screen" (a drawn window with buttons, apart from those), and where `pictures`
    are given "swapped": one of them that is not the question's own. Floats lie in [0, 1], integers in their range.
    """

    def to(make: Callable[[Picture, np.random.Generator], Picture]) -> Perturbation:
        def perturb(question: Question, rng: np.random.Generator) -> Perturbed:
            if source not in question.sources:
                raise ValueError(
                    f"question {question.id!r} has no source {source!r} to replace, only {sorted(question.sources)}; "
                    "give text questions a neutral picture (a grey one, say)"
                )
            own = np.asarray(question.sources[source])
            return Perturbed(question.given(source, make(own, rng)))

        return perturb

    def swapped(own: Picture, rng: np.random.Generator) -> Picture:
        others = [i for i, p in enumerate(pictures) if not np.array_equal(p, own)]
        if not others:
            raise ValueError(f"none of the {len(pictures)} pictures differs from the question's own; give others")
        return np.asarray(pictures[int(rng.choice(others))])

    made = {
        "random pixels": to(lambda own, rng: _scaled(rng.random(own.shape), own)),
        "black": to(lambda own, rng: _scaled(np.zeros(own.shape), own)),
        "white": to(lambda own, rng: _scaled(np.ones(own.shape), own)),
        "screen": to(lambda own, rng: _scaled(_screen(own.shape, rng), own)),
    }
    return made | ({"swapped": to(swapped)} if len(pictures) else {})


def _scaled(unit: Float[np.ndarray, ...], like: Picture) -> Picture:
    """Numbers from 0 to 1 in the range and type of a picture."""
    whole = np.issubdtype(like.dtype, np.integer)
    return (unit * np.iinfo(like.dtype).max).round().astype(like.dtype) if whole else unit.astype(like.dtype)


def _screen(shape: tuple[int, ...], rng: np.random.Generator) -> Float[np.ndarray, ...]:
    """A bright window with a dark bar on top and a few dark buttons, on the two axes of height and width."""
    colour_last = len(shape) == 3 and shape[-1] in (1, 3, 4)
    height, width = shape[:2] if colour_last else shape[-2:]
    flat = np.full((height, width), 0.9)
    flat[: max(1, height // 8)] = 0.3
    for _ in range(3):
        y, x = int(rng.integers(height // 4, height)), int(rng.integers(width))
        flat[y : y + max(1, height // 8), x : x + max(1, width // 3)] = 0.5
    return np.broadcast_to(flat[..., None] if colour_last else flat, shape)


class Perturbing(NamedTuple):
    """Perturbed questions, question by question."""

    questions: list[Question]
    towards: list[int | None]


def perturb(questions: Sequence[Question], perturbation: Perturbation, *, seed: int = 0) -> Perturbing:
    """Every question after the intervention, drawn by the seed."""
    rng = np.random.default_rng(seed)
    made = [perturbation(question, rng) for question in questions]
    return Perturbing([p.question for p in made], [p.towards for p in made])


@dataclass(frozen=True)
class Interference:
    """What one intervention does, with 95% intervals over questions."""

    accuracy: Interval
    """With the intervention."""
    loss: Interval
    """Accuracy without it, minus `accuracy`."""
    change_rate: Interval
    divergence: Interval | None
    """None where the model gives no probabilities."""
    followed: Interval | None
    """Share that choose what the intervention speaks for, minus the share that chose it before; None: it does not."""


AGAIN = "asked again"


def interference_report(
    answer: Answerer,
    questions: Sequence[Question],
    suite: Mapping[str, Perturbation],
    *,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: bool = True,
) -> dict[str, Interference]:
    """{intervention: what it does}, with the control "asked again" first: what the model's own dice change.

    Raises ValueError for fewer than two questions, or one that cannot be perturbed, before anything is asked.
    """
    check(questions, ())
    if len(questions) < 2:
        raise ValueError("one question gives no interval; give two or more")
    made = {name: perturb(questions, perturbation, seed=seed) for name, perturbation in suite.items()}

    def replies(asked: Sequence[Question], words: str) -> list[Any]:
        pairs = ask(asked, answer, batch_size=batch_size, description=f"asking, {words}", progress=progress)
        return [reply for _, reply in pairs]

    clean = replies(questions, "unperturbed")
    made = {AGAIN: Perturbing(list(questions), [None] * len(questions)), **made}
    return {name: _compare(questions, clean, replies(p.questions, name), p.towards) for name, p in made.items()}


def _compare(
    questions: Sequence[Question], clean: Sequence[Any], perturbed: Sequence[Any], towards: Sequence[int | None]
) -> Interference:
    before, after = ([decision(r) for r in replies] for replies in (clean, perturbed))
    right_before, right_after = ([float(d == q.answer) for d, q in zip(ds, questions)] for ds in (before, after))
    probabilities = all(np.ndim(r) == 1 for r in (*clean, *perturbed))
    followed = None
    if None not in towards:
        followed = difference(*([float(d == t) for d, t in zip(ds, towards)] for ds in (after, before)))
    return Interference(
        accuracy=bootstrap(right_after),
        loss=difference(right_before, right_after),
        change_rate=bootstrap([float(a != b) for a, b in zip(before, after)]),
        divergence=bootstrap([_js(p, q) for p, q in zip(clean, perturbed)]) if probabilities else None,
        followed=followed,
    )


def _js(p: Any, q: Any) -> float:
    return float(jensen_shannon(*(torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (p, q))))


def jensen_shannon(p: Float[Tensor, "... e"], q: Float[Tensor, "... e"]) -> Float[Tensor, ...]:
    """Half of KL(p || m) + KL(q || m), m = (p + q) / 2, in nats: 0 for equal distributions, log 2 for disjoint ones."""
    entropy = torch.special.entr
    return (entropy((p + q) / 2).sum(-1) - (entropy(p).sum(-1) + entropy(q).sum(-1)) / 2).clamp_min(0)


def as_table(report: Mapping[str, Interference]) -> pl.DataFrame:
    """One row for each intervention and measure: perturbation, measure, estimate, low, high."""
    measures = ("accuracy", "loss", "change_rate", "divergence", "followed")
    rows = [
        (name, measure, i.estimate, i.low, i.high)
        for name, found in report.items()
        for measure in measures
        if (i := getattr(found, measure)) is not None
    ]
    return pl.DataFrame(rows, schema=["perturbation", "measure", "estimate", "low", "high"], orient="row")


@dataclass(frozen=True)
class RoutingShift:
    """JS divergence, in nats, of the routing of one layer from that of the unperturbed input, mean over texts."""

    perturbed: Interval
    control: Interval
    excess: Interval
    """`perturbed` minus `control`, text by text."""


def routing_shift(clean: Profiles, perturbed: Profiles, control: Profiles) -> dict[int, RoutingShift]:
    """{layer: how far an intervention moves the routing of tokens that it leaves alone, beside a harmless one}

    The profiles are of the same samples and of those tokens only: `TextProfiles(skip=)` the others, all words where the
    image tokens are looked at. A decoder's tokens see what comes before them: text moves the routing of an image only
    where it precedes it.

    Raises ValueError where the profiles are not of the same samples and numbers of tokens.
    """
    for name, other in (("perturbed", perturbed), ("control", control)):
        if clean.samples.tolist() != other.samples.tolist() or clean.tokens.tolist() != other.tokens.tolist():
            raise ValueError(
                f"the {name} profiles are of {len(other)} texts with {int(other.tokens.sum())} tokens, the clean ones "
                f"of {len(clean)} with {int(clean.tokens.sum())}; observe the same tokens of the same samples"
            )
    shifts = {}
    for layer, routing in clean.importance.items():
        moved, harmless = (jensen_shannon(routing, p.importance[layer]).tolist() for p in (perturbed, control))
        shifts[layer] = RoutingShift(bootstrap(moved), bootstrap(harmless), difference(moved, harmless))
    return shifts
