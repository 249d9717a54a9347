"""Five concepts, thought to be of rising difficulty, are probed in every layer of `quartet` and of `solo`, its dense
twin: pieces of documentation or of code; English or German strings of user interfaces; equations that are right or
wrong; lists in order or with two inner members exchanged; heads or tails after six steps in which a coin is flipped or
not. 500 texts of each class, no text twice. Nothing is asked of the model: a text is read, and the state at its last
token is probed.

- *Probes* as in the paper: logistic regression, 60% of the texts for training, the depth indicators at its thresholds
  (1.1 and 0.03); features standardised; three splits, over which ± is the standard deviation. The residual stream after
  each layer is read, and for `quartet` the input of its experts as well, which the paper's code reads, and the router's
  probabilities.
- *Controls*: an untrained copy of `quartet`; logistic regression on counts of the texts' tokens; shuffled labels.
- *What may push a concept deeper*: "aaa" or "bbb" before each text; weights rounded to 8 and to 4 bits.
- *Difficulty*, layers aside: whether `quartet` itself answers yes or no. It was not trained to.

The converging point is the layer after which the accuracy changes by less than 3% from layer to layer; the literal one
of the paper (the last layer with such a change) is the last layer nearly always. 400 test texts leave an accuracy
uncertain by 0.025, and so single converging points; these have intervals over the test texts.

What came out, written after the run: code and German are read off the first layers (and off counts of tokens just as
well). Order in lists, which counts say nothing about, rises up to the fifth layer and not without training: it is the
one concept here that has a depth. Right equations and heads are at chance in every layer, where a converging point is
noise; so the first claim, which compares equations with code, holds for no good reason. Lists are what it should have
named: counted from 0 they settle at layer 4 and code at layer 1, with intervals, 4 to 5 and 1 to 5, that still overlap.
That noise and 8 bits make a model settle later is not seen: they move the mean accuracy by no more than its interval.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import moestro.view.open as opening
from moestro.analyze.concept_depth import (
    Concept,
    ProbeCurve,
    concept_depth,
    probe_layers,
    rounded_weights,
    with_noise,
    yes_or_no,
)
from moestro.analyze.layer_states import LastTokens, layer_states
from moestro.bundled import bundled_path
from moestro.data import Document, embedded, token_batches
from moestro.data.parallel import parallel_strings
from moestro.data.tasks import NAMES
from moestro.evidence.base import Claim, Evidence, Rows
from moestro.stats import difference
from moestro.view.layers import load
from moestro.view.observe import progress_bar

TITLE = "Exploring Concept Depth: How Large Language Models Acquire Knowledge and Concept at Different Layers?"
ARXIV = "2404.07066"
CLAIM = (
    "Simple concepts can be read off a model's first layers, complex ones off deeper layers or not at all; noise in "
    "the input and 8-bit weights make a model settle later."
)
SOURCES = (
    "analyze/concept_depth.py",
    "analyze/layer_states.py",
    "data/tasks.py",
    "data/parallel.py",
    "data/sample/*.jsonl.gz",
    "data/sample/parallel/strings.jsonl.gz",
    "bundled/*/model.safetensors",
)
QUICK = {"texts": 240, "splits": 1}
NOT_SHOWN = {
    "lower end of the accuracy that 4 bits cost, mean of all layers and concepts": (
        "the cost is 0.003, between -0.005 and 0.011: every row of a matrix has a scale of its own, the probes are "
        "trained anew on the rounded model's states, and two of the five concepts are at chance to begin with"
    ),
}

CODE, LANGUAGE, EQUATION, ORDER, COIN = "code", "german", "right equation", "list in order", "heads"
CONCEPTS = (CODE, LANGUAGE, EQUATION, ORDER, COIN)
PLAIN, SOLO, UNTRAINED, NOISE, INT8, INT4 = "quartet", "solo", "untrained", "noise", "8 bits", "4 bits"
MLP, ROUTER = "quartet, experts' input", "quartet, router"
SEED = 42

# Thresholds, stated before the first run.
GAIN_ON_UNTRAINED = 0.10
CHANCE = 0.07  # how far shuffled labels may be from a half
EARLIER = 1.0  # layers

ACCURACY = "accuracy of the probe after each layer"
PEAK = "highest accuracy of any layer"
SETTLED = "converging point, in layers (0: the first)"
JUMP = "jump point, in layers; 6 where there is none"
INTERVAL = "first split: converging point and peak of quartet with their 95% intervals"
SHUFFLED = "accuracy with shuffled labels, mean over layers"
GAP = "accuracy on the training texts minus accuracy, mean over layers"
COUNTS = "accuracy of token counts"
ANSWER = "share of texts on which quartet's own yes or no is right"
PAIRED = "first split: difference of accuracies with its 95% interval"


def run(*, texts: int = 1000, splits: int = 3, progress: bool = True) -> Evidence:
    """Read every concept under every condition, and probe all layers."""
    rows, curves = Rows(), {}
    view = opening.open("quartet", dtype=torch.float32)
    with progress_bar(progress) as bar:
        task = bar.add_task("concepts", total=len(CONCEPTS))
        for name in CONCEPTS:
            concept = make_concept(name, texts)
            for condition, states, noisy in conditions(view, concept):
                for seed in range(SEED, SEED + splits):
                    curve = probe_layers(states, noisy, seed=seed, progress=False)
                    curves[name, condition, seed] = curve
                    add(rows, name, condition, curve)
            counts = {0: token_counts(view.tokenizer, concept)}
            for seed in range(SEED, SEED + splits):
                (accuracy,) = probe_layers(counts, concept, seed=seed, progress=False).accuracy.tolist()
                rows.add(COUNTS, {"concept": name}, accuracy)
            answer = yes_or_no(view.model, view.tokenizer, concept, progress=False)
            for end in ("estimate", "low", "high"):
                rows.add(ANSWER, {"concept": name, "": end}, getattr(answer, end))
            bar.advance(task)
    paired(rows, curves)
    return Evidence(rows=list(rows), claims=claims(rows))


def conditions(view: Any, concept: Concept) -> Iterator[tuple[str, dict[int, torch.Tensor], Concept]]:
    """(name, states, the concept in the texts that were read)"""
    tokenizer = view.tokenizer

    def read(model: Any, of: Concept = concept, site: str = "residual") -> dict[int, torch.Tensor]:
        return layer_states(model, tokenizer, of.texts, site=site, progress=False)

    yield PLAIN, read(view), concept
    yield MLP, read(view, site="mlp_input"), concept
    documents = [Document(text=text) for text in concept.texts]
    batches = token_batches(documents, tokenizer, max_length=512, batch_size=32)
    (router,) = view.observe(batches, [LastTokens("router")], progress=False)
    yield ROUTER, router, concept
    yield SOLO, read(load(str(bundled_path("solo")), dtype=torch.float32)[0]), concept
    torch.manual_seed(SEED)
    yield UNTRAINED, read(type(view.model)(view.model.config).eval()), concept
    noisy = Concept(concept.name, with_noise(concept.texts, seed=SEED), concept.labels)
    yield NOISE, read(view, noisy), noisy
    for name, bits in ((INT8, 8), (INT4, 4)):
        with rounded_weights(view, bits):
            states = read(view)
        yield name, states, concept


def token_counts(tokenizer: Any, concept: Concept) -> torch.Tensor:
    """[S, V of the concept]: how often each token occurs in each text."""
    ids = tokenizer(list(concept.texts), add_special_tokens=False)["input_ids"]
    column = {v: i for i, v in enumerate(sorted({v for row in ids for v in row}))}
    table = torch.zeros(len(ids), len(column))
    for s, row in enumerate(ids):
        table[s].index_add_(0, torch.tensor([column[v] for v in row]), torch.ones(len(row)))
    return table


def add(rows: Rows, name: str, condition: str, curve: ProbeCurve) -> None:
    for layer, accuracy in zip(curve.layers, curve.accuracy.tolist(), strict=True):
        rows.add(ACCURACY, {"concept": name, "of": condition, "layer": str(layer)}, accuracy)
    depth = concept_depth(curve)
    place = {"concept": name, "of": condition}
    rows.add(PEAK, place, depth.peak.estimate)
    rows.add(SETTLED, place, depth.converging_point.estimate * curve.depth)
    rows.add(JUMP, place, (depth.jump_point.estimate if depth.jump_point else 1.0) * curve.depth)
    rows.add(SHUFFLED, place, float(curve.shuffled.mean()))
    rows.add(GAP, place, float((curve.train_accuracy - curve.accuracy).mean()))
    if condition == PLAIN and len(rows.values(PEAK, place)) == 1:
        for what, interval, scale in (("layers", depth.converging_point, curve.depth), ("peak", depth.peak, 1)):
            for end in ("estimate", "low", "high"):
                rows.add(INTERVAL, {"concept": name, "": f"{what}, {end}"}, getattr(interval, end) * scale)


def paired(rows: Rows, curves: dict[tuple[str, str, int], ProbeCurve]) -> None:
    """Differences over the same test texts."""

    def best(name: str, condition: str) -> np.ndarray:
        curve = curves[name, condition, SEED]
        return curve.correct[:, curve.best].double().numpy()

    def mean(condition: str) -> np.ndarray:
        return np.concatenate([curves[name, condition, SEED].correct.double().mean(1).numpy() for name in CONCEPTS])

    found = {
        f"peak of quartet minus untrained, {name}": difference(best(name, PLAIN), best(name, UNTRAINED))
        for name in CONCEPTS
    }
    for other in (NOISE, INT8, INT4):
        found[f"mean of all layers and concepts: quartet minus {other}"] = difference(mean(PLAIN), mean(other))
    for name, interval in found.items():
        for end in ("estimate", "low", "high"):
            rows.add(PAIRED, {"of": name, "": end}, getattr(interval, end))


# The concepts


def make_concept(name: str, texts: int) -> Concept:
    """`texts` texts, half of each class, none twice; the same for the same number."""
    rng = random.Random(name)
    make = {CODE: _code, LANGUAGE: _german, EQUATION: _equation, ORDER: _order, COIN: _coin}[name]
    found: dict[str, int] = {}
    wanted = {label: texts // 2 for label in (0, 1)}
    for text, label in make(rng):
        if wanted[label] and text not in found:
            found[text] = label
            wanted[label] -= 1
        if not any(wanted.values()):
            break
    return Concept(name, list(found), list(found.values()))


Labelled = Iterator[tuple[str, int]]


def _code(rng: random.Random, length: int = 80) -> Labelled:
    """Pieces of about 80 characters, from one blank to another."""
    pieces = []
    for domain, label in (("science", 0), ("code", 1)):
        for document in embedded(domain, "all"):
            text = " ".join((document.text or "").split())
            starts = range(0, len(text) - 2 * length, length)
            pieces += [(text[text.find(" ", s) + 1 : text.find(" ", s + length)], label) for s in starts]
    rng.shuffle(pieces)
    yield from ((text, label) for text, label in pieces if len(text) > length // 2)


def _german(rng: random.Random) -> Labelled:
    strings = [s for s in parallel_strings(["en", "de"]) if s["en"] != s["de"] and len(s["en"]) > 10]
    rng.shuffle(strings)
    for number, string in enumerate(strings):
        yield string["de" if number % 2 else "en"], number % 2  # no string in both languages


def _equation(rng: random.Random) -> Labelled:
    while True:
        a, b, label = rng.randrange(100), rng.randrange(100), rng.randrange(2)
        minus = rng.randrange(2)
        if minus:
            a, b = max(a, b), min(a, b)
        right = a - b if minus else a + b
        wrong = right + rng.choice((-10, -2, -1, 1, 2, 10))
        if wrong >= 0:
            yield f"{a} {'-' if minus else '+'} {b} = {right if label else wrong}", label


def _order(rng: random.Random, length: int = 7) -> Labelled:
    """The first and the last number are in their place in both classes."""
    while True:
        numbers, label = sorted(rng.sample(range(100), length)), rng.randrange(2)
        if not label:
            i, j = rng.sample(range(1, length - 1), 2)
            numbers[i], numbers[j] = numbers[j], numbers[i]
        yield " ".join(map(str, numbers)), label


def _coin(rng: random.Random, steps: int = 6) -> Labelled:
    while True:
        flips = [rng.randrange(2) for _ in range(steps)]
        told = " ".join(f"{n} {'flips' if f else 'does not flip'} it." for n, f in zip(rng.sample(NAMES, steps), flips))
        yield f"The coin is heads up. {told} Is it heads up?", 1 - sum(flips) % 2


# What it comes to


def claims(rows: Rows) -> list[Claim]:
    def of(metric: str, name: str, condition: str = PLAIN) -> float:
        return rows.mean(metric, {"concept": name, "of": condition})

    def earlier(condition: str) -> float:
        return max(of(SETTLED, name) - of(SETTLED, name, condition) for name in CONCEPTS)

    conditions = (PLAIN, MLP, ROUTER, SOLO, UNTRAINED, NOISE, INT8, INT4)
    return [
        Claim(
            name="layers by which quartet settles later on right equations than on code",
            measured=of(SETTLED, EQUATION) - of(SETTLED, CODE),
            relation=">=",
            needed=0,
        ),
        Claim(
            name="accuracy that training adds to the peak, on equations or lists, whichever gains more",
            measured=max(of(PEAK, name) - of(PEAK, name, UNTRAINED) for name in (EQUATION, ORDER)),
            relation=">=",
            needed=GAIN_ON_UNTRAINED,
        ),
        Claim(
            name="most that shuffled labels differ from a half, of any concept and condition",
            measured=max(abs(of(SHUFFLED, name, c) - 0.5) for name in CONCEPTS for c in conditions),
            relation="<=",
            needed=CHANCE,
        ),
        *(
            Claim(
                name=f"most layers by which {condition} makes quartet settle earlier on any concept",
                measured=earlier(condition),
                relation="<=",
                needed=EARLIER,
            )
            for condition in (NOISE, INT8)
        ),
        Claim(
            name="lower end of the accuracy that 4 bits cost, mean of all layers and concepts",
            measured=rows.mean(PAIRED, {"of": f"mean of all layers and concepts: quartet minus {INT4}", "": "low"}),
            relation=">",
            needed=0,
        ),
    ]
