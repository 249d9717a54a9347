"""Section on depth: from which layer on the domain of a text can be read off."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from moestro import stats
from moestro.analyze.concept_depth import SEED, TEST_SIZE, ProbeCurve, concept_depth
from moestro.looking.collect import Collected
from moestro.looking.result import SERIES, Heat, Lines, Section

TITLE = "Depth: where the domain can be read off"
LEAST_TEXTS = 10
"""Of a domain that takes part: six to train on, four to test."""
ALPHAS = tuple(10.0**n for n in range(-1, 6))
"""Strengths of the probe's penalty, of which cross-validation on the training texts takes one."""


def depth_section(seen: Collected) -> Section:
    """One linear probe a layer for the domain, on what the experts read and on what the router says."""
    domain_of = dict(zip(seen.profiles.samples.tolist(), seen.profiles.domain.tolist(), strict=True))
    labels = np.array([domain_of[s] for s in seen.state_samples])
    counts = np.bincount(labels, minlength=len(seen.profiles.domains))
    taking_part = np.flatnonzero(counts >= LEAST_TEXTS)
    if len(taking_part) < 2:
        return Section(
            "depth",
            TITLE,
            absent=f"A probe needs two domains of {LEAST_TEXTS} texts or more: give more texts (--data) or --tokens.",
        )
    rows = np.flatnonzero(np.isin(labels, taking_part))
    y = labels[rows]
    train, test = train_test_split(np.arange(len(y)), test_size=TEST_SIZE, random_state=SEED, stratify=y)
    mixed = np.random.default_rng(seen.seed).permutation(y)
    names = {"what the experts read": seen.states, "what the router says": seen.router_states}
    right: dict[str, dict[int, NDArray]] = {name: {} for name in (*names, "domains exchanged")}
    for name, states in names.items():
        for layer, vectors in states.items():
            right[name][layer] = _correct(vectors[rows], y, train, test)
    for layer, vectors in seen.states.items():
        right["domains exchanged"][layer] = _correct(vectors[rows], mixed, train, test)
    first = right["what the experts read"]
    depth = concept_depth(_curve(first, test, seen))
    best = max(first, key=lambda layer: first[layer].mean())
    accuracy = stats.bootstrap(first[best])
    exchanged = float(np.mean([hits.mean() for hits in right["domains exchanged"].values()]))
    converged = depth.converging_point
    findings = (
        f"A linear probe tells {len(taking_part)} domains apart with accuracy {accuracy} at its best, in layer {best}; "
        f"with exchanged domains it reaches {exchanged:.3f}.",
        f"From {converged.estimate:.0%} [{converged.low:.0%}, {converged.high:.0%}] of the model's depth on, its "
        "accuracy no longer moves by 3% from one layer to the next.",
    )
    lines = Lines(
        name="depth",
        title="Accuracy of the probes, layer by layer",
        read="The share of the texts it was not trained on that a probe gives to the right domain, from the vector at "
        "the last token, beside probes of exchanged domains; what a probe can read the model need not use.",
        table=_accuracies(right),
        unit="accuracy",
        controls=("domains exchanged",),
    )
    heat = Heat(
        name="depth-domains",
        title="Which domains are told apart where",
        read="A row is a domain, a column a layer, the colour the share of its texts that the probe of what the "
        "experts read gives to it.",
        table=_by_domain(first, y[test], seen),
        row="domain",
        column="layer",
        value="recognised",
        steps=(0.2, 0.4, 0.6, 0.8, 0.95),
        unit="share of texts",
    )
    return Section("depth", TITLE, findings, (lines, heat))


def _correct(vectors: Float[Tensor, "s h"], y: NDArray, train: NDArray, test: NDArray) -> NDArray:
    """Whether the probe gives each test text to the right domain."""
    x = vectors.double().numpy()
    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(ALPHAS)).fit(x[train], y[train])
    return (probe.predict(x[test]) == y[test]).astype(float)


def _curve(right: dict[int, NDArray], test: NDArray, seen: Collected) -> ProbeCurve:
    """The accuracies in the form that depth indicators are read from."""
    correct = torch.from_numpy(np.stack(list(right.values()), axis=1)).bool()
    accuracy = correct.double().mean(dim=0)
    unknown = torch.full_like(accuracy, float("nan"))
    config = seen.view.model.config.get_text_config()
    depth = max(getattr(config, "num_hidden_layers", 0), max(right) + 1)
    return ProbeCurve(
        tuple(right), depth, accuracy, unknown, unknown, unknown, unknown, correct, torch.from_numpy(test)
    )


def _accuracies(right: dict[str, dict[int, NDArray]]) -> pl.DataFrame:
    rows = []
    for name, layers in right.items():
        for layer, hits in layers.items():
            found = stats.bootstrap(hits)
            rows.append((layer, name, found.estimate, found.low, found.high))
    return pl.DataFrame(rows, schema=SERIES, orient="row")


def _by_domain(right: dict[int, NDArray], y: NDArray, seen: Collected) -> pl.DataFrame:
    rows = [
        (seen.profiles.domains[d], layer, float(hits[y == d].mean()), int((y == d).sum()))
        for d in np.unique(y)
        for layer, hits in right.items()
    ]
    return pl.DataFrame(rows, schema=["domain", "layer", "recognised", "test_texts"], orient="row")
