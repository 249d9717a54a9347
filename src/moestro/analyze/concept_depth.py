"""At which depth a model first holds a concept: linear probes of every layer, where they rise and where they settle.

A concept is a binary label of texts. With a_i the accuracy of layer i's probe on texts it was not trained on, of d
layers, and the variation rate b_i = a_i / a_{i-1}:

    jump point       = min{i : b_i >= 1.1} / d                                    it may not exist
    converging point = min{i : |b_j - 1| < 0.03 for all j > i} / d                after it the curve is flat
    peak             = max a_i, and its depth

The paper writes the converging point as the largest i with |b_i - 1| < 0.03, which is nearly always the last layer. A
probe shows that a label can be read off; that the model uses it, it does not show.

"Exploring Concept Depth: How Large Language Models Acquire Knowledge and Concept at Different Layers?"
(arXiv:2404.07066). Shapes: S texts, H hidden, L layers, N training texts, M test texts, I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from moestro.analyze.layer_states import States, decoder_layers
from moestro.data import Document, token_batches
from moestro.stats import Interval, bootstrap, bootstrap_totals
from moestro.view.observe import progress_bar
from moestro.view.open import ExpertView

JUMP, FLAT = 1.1, 0.03  # the paper's
TEST_SIZE, SEED = 0.4, 42  # the paper's
MIN_TEXTS = 50
"""Texts of each class: with fewer, an accuracy is off by more than a probe's whole gain."""


@dataclass(frozen=True)
class Concept:
    """Texts with a label that is 1 where the concept is there, else 0 (F1 is that of class 1).

    Raises ValueError where the labels are no such, or a class has fewer than MIN_TEXTS texts.
    """

    name: str
    texts: Sequence[str]
    labels: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise ValueError(f"{self.name}: {len(self.texts)} texts and {len(self.labels)} labels; one for each text")
        if other := sorted({label for label in self.labels if label not in (0, 1)}):
            raise ValueError(f"{self.name}: label {other[0]!r}; a probe's labels are 0 and 1")
        for label in (0, 1):
            count = sum(int(x) == label for x in self.labels)
            if count < MIN_TEXTS:
                raise ValueError(
                    f"{self.name}: {count} texts with label {label}; a probe needs {MIN_TEXTS} of each class"
                )

    def __len__(self) -> int:
        return len(self.texts)

    def split(self, test_size: float = TEST_SIZE, seed: int = SEED) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
        """(training texts, test texts), both classes in their proportion. Raises ValueError where a text is in both."""
        train, test = train_test_split(
            np.arange(len(self)), test_size=test_size, random_state=seed, stratify=np.asarray(self.labels)
        )
        if both := {self.texts[i] for i in train} & {self.texts[i] for i in test}:
            raise ValueError(
                f"{self.name}: {len(both)} texts are in training and test, {min(both)[:40]!r} for one; keep one of each"
            )
        return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(test))


Probe = Callable[[int], Any]
"""seed -> a scikit-learn classifier"""


def logistic_probe(seed: int) -> Any:
    """Logistic regression on standardised features (L2, C = 1): layers differ in scale, and a few features dominate."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, random_state=seed))


def forest_probe(seed: int) -> Any:
    """A random forest, for labels that are there and yet not linear."""
    return RandomForestClassifier(random_state=seed)


@dataclass(frozen=True)
class ProbeCurve:
    """How well each layer's probe does, on the test texts unless said otherwise."""

    layers: tuple[int, ...]
    depth: int
    """Layers of the model, d."""
    accuracy: Float[Tensor, " l"]
    f1: Float[Tensor, " l"]
    auc: Float[Tensor, " l"]
    train_accuracy: Float[Tensor, " l"]
    shuffled: Float[Tensor, " l"]
    """Accuracy of a probe trained and tested on the labels in random order: what probes make of nothing."""
    correct: Bool[Tensor, "m l"]
    test: Int[Tensor, " m"]
    """Numbers of the test texts."""

    @property
    def best(self) -> int:
        """The row of `layers` with the highest accuracy, the first of equal ones."""
        return int(self.accuracy.argmax())


def probe_layers(
    states: States,
    concept: Concept,
    *,
    depth: int | None = None,
    probe: Probe = logistic_probe,
    test_size: float = TEST_SIZE,
    seed: int = SEED,
    progress: bool = True,
) -> ProbeCurve:
    """Train one probe a layer, on the same part of the texts. `depth`: layers of the model, by default the last's + 1.

    Raises ValueError where states and texts do not fit, or a text is in training and test.
    """
    for layer, vectors in states.items():
        if len(vectors) != len(concept):
            raise ValueError(f"layer {layer} has states of {len(vectors)} texts, and {concept.name} has {len(concept)}")
    train, test = concept.split(test_size, seed)
    y = np.asarray(concept.labels, dtype=int)
    rng = np.random.default_rng(seed)
    measures: dict[str, list[float]] = {n: [] for n in ("accuracy", "f1", "auc", "train_accuracy", "shuffled")}
    correct = []
    with progress_bar(progress) as bar:
        for vectors in bar.track(list(states.values()), description=f"probes of {concept.name}"):
            x = vectors.numpy()
            fitted = probe(seed).fit(x[train], y[train])
            said, chance = fitted.predict(x[test]), fitted.predict_proba(x[test])[:, 1]
            mixed = rng.permutation(y)
            control = probe(seed).fit(x[train], mixed[train])
            found = (
                (said == y[test]).mean(),
                f1_score(y[test], said),
                roc_auc_score(y[test], chance),
                fitted.score(x[train], y[train]),
                control.score(x[test], mixed[test]),
            )
            for values, value in zip(measures.values(), found, strict=True):
                values.append(float(value))
            correct.append(torch.from_numpy(said == y[test]))
    columns = {name: torch.tensor(values, dtype=torch.float64) for name, values in measures.items()}
    layers = tuple(states)
    return ProbeCurve(
        layers=layers, depth=depth or max(layers) + 1, correct=torch.stack(correct, dim=1), test=test, **columns
    )


@dataclass(frozen=True)
class ConceptDepth:
    """Where a curve rises, settles and is highest, as fractions of the depth; intervals are over the test texts."""

    jump_point: Interval | None
    """None where there is none; resamples without one count as 1."""
    converging_point: Interval
    peak: Interval
    peak_depth: float


def concept_depth(curve: ProbeCurve, *, jump: float = JUMP, flat: float = FLAT) -> ConceptDepth:
    """The depth indicators. With m test texts a_i is known to about 0.5 / sqrt(m): a flatness of 0.03 wants 600."""
    correct, place = curve.correct.double().numpy(), np.asarray(curve.layers) / curve.depth

    def indicators(hits: np.ndarray) -> np.ndarray:
        a = hits / len(correct)
        return np.stack(
            [np.append(place, 1.0)[jump_row(a, jump)], place[converging_row(a, flat)], a.max(axis=1)], axis=1
        )

    rise, settled, peak = bootstrap_totals(correct, indicators)
    return ConceptDepth(rise if rise.estimate < 1 else None, settled, peak, float(place[curve.best]))


def jump_row(accuracy: np.ndarray, jump: float = JUMP) -> np.ndarray:
    """First layer of [..., L] whose accuracy is `jump` times the one before; L where there is none."""
    jumps = accuracy[..., 1:] >= jump * accuracy[..., :-1]
    return np.where(jumps.any(axis=-1), jumps.argmax(axis=-1) + 1, accuracy.shape[-1])


def converging_row(accuracy: np.ndarray, flat: float = FLAT) -> np.ndarray:
    """First layer of [..., L] after which no accuracy differs from the one before by the part `flat` or more."""
    moves = np.abs(np.diff(accuracy, axis=-1)) >= flat * accuracy[..., :-1]
    last = accuracy.shape[-1] - 1 - moves[..., ::-1].argmax(axis=-1)
    return np.where(moves.any(axis=-1), last, 0)


# What may push a concept deeper


def with_noise(texts: Sequence[str], *, seed: int = 0, words: Sequence[str] = ("aaa", "bbb")) -> list[str]:
    """Every text with one of the words, drawn at random, right before it."""
    rng = np.random.default_rng(seed)
    return [words[i] + text for i, text in zip(rng.integers(len(words), size=len(texts)), texts, strict=True)]


@contextmanager
def rounded_weights(model: Any, bits: int) -> Iterator[None]:
    """The matrices of all decoder layers in fewer bits, until the block ends. `model`: a language model or a view.

    16 is bfloat16; 2 to 8 are the nearest of 2^bits - 1 steps, even about 0, with a scale for each row.
    Raises ValueError for another number.
    """
    if bits != 16 and not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}; weights are rounded to 16 (bfloat16), or 2 to 8")
    stack = model.stack if isinstance(model, ExpertView) else model.get_decoder()
    matrices = [p for block in decoder_layers(stack) for p in block.parameters() if p.dim() > 1]
    before = [p.detach().clone() for p in matrices]
    try:
        with torch.no_grad():
            for p in matrices:
                p.copy_(p.bfloat16() if bits == 16 else nearest(p, bits))
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(matrices, before, strict=True):
                p.copy_(old)


def nearest(weight: Float[Tensor, "*g i"], bits: int) -> Float[Tensor, "*g i"]:
    """Round to nearest with one scale a row: q = round(w / s), s = max|w| / (2^(bits-1) - 1)."""
    most = 2 ** (bits - 1) - 1
    scale = weight.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / most
    return ((weight.float() / scale).round() * scale).to(weight.dtype)


# How hard a concept is to the model, layers aside

YES, NO = ("yes", "Yes", "YES", " yes", " Yes", " YES"), ("no", "No", "NO", " no", " No", " NO")


@torch.no_grad()
def yes_or_no(
    model: Any,
    tokenizer: Any,
    concept: Concept,
    *,
    question: str = "{text}\nAnswer yes or no:",
    yes: Sequence[str] = YES,
    no: Sequence[str] = NO,
    batch_size: int = 8,
    progress: bool = True,
) -> Interval:
    """Share of texts whose label the model answers: P(yes) > P(no) for 1, summed over the first tokens of the words.

    With an interval over texts. Raises ValueError where a yes and a no begin with the same tokens, or the question has
    no {text}.
    """
    if "{text}" not in question:
        raise ValueError(f"question={question!r} does not hold {{text}}, the place of the text")
    agree, deny = ({tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in words} for words in (yes, no))
    agree, deny = agree - deny, deny - agree
    if not agree or not deny:
        raise ValueError(f"{[*yes]} and {[*no]} begin with the same tokens; take other words")
    documents = [Document(text=question.format(text=text)) for text in concept.texts]
    batches = token_batches(documents, tokenizer, max_length=2**31, batch_size=batch_size, padding_side="left")
    right = torch.zeros(len(concept))
    with progress_bar(progress) as bar:
        for batch in bar.track(batches, description=f"answers to {concept.name}"):
            inputs = {k: getattr(batch, k).to(model.device) for k in ("input_ids", "attention_mask")}
            chance = model(**inputs, use_cache=False).logits[:, -1].float().softmax(dim=-1)
            said = chance[:, sorted(agree)].sum(dim=1) > chance[:, sorted(deny)].sum(dim=1)
            right[batch.sample] = (said.cpu().long() == torch.tensor(concept.labels)[batch.sample]).float()
    return bootstrap(right)
