"""Where a model routes languages alike: how far the routing of translations diverges, layer by layer, and for which
experts a task or a language is recognised.

    q      = mean over a text's tokens of p_t              p: the router's probabilities over all E experts
    JSD    = H((q1 + q2) / 2) - (H(q1) + H(q2)) / 2
    D      = JSD / (log E - (H(q1) + H(q2)) / 2)           in [0, 1]: no mixture's entropy exceeds log E
    Div    = mean of D over the texts of the pivot language and their translations

    delta  = mean over target texts of a / tokens - the same of baseline texts          a: tokens an expert served

Entropies differ by layer, and D, unlike JSD, can be compared between them. The layers where Div is low are shared by
the languages: `middle_layers`. `router_steering` pushes their routing, in all languages, to the experts of a task.

    profiles = language_profiles(view, {"en": [...], "de": [...]})
    middle = middle_layers(language_divergence(profiles, pivot="en"))
    texts = text_profiles(view, {"task": [...], "other": [...]})
    experts = task_experts(activation_delta(texts.of("task"), texts.of("other")), 0.3, layers=middle)

"Multilingual Routing in Mixture-of-Experts" (arXiv:2510.04694).
Shapes: S texts, E experts, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from moestro.analyze.profiles import Profiles, TextProfiles, chosen_experts
from moestro.data import Document, token_batches
from moestro.sets import Chosen, Scores, above
from moestro.stats import Interval, bootstrap, corrected, permutation_test
from moestro.view.events import MoEEvent

MAX_LENGTH = 512
BATCH_TOKENS = 8192
FEWEST_LANGUAGES = 4
"""A correlation over three has no two-sided p-value below 1/3."""

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Of two stacks of distributions [S, E]: one number for each pair [S]."""


def text_profiles(
    view: Any, texts: Mapping[str, Sequence[str]], *, max_length: int = MAX_LENGTH, progress: bool = True
) -> Profiles:
    """Profiles of {name: texts}, one after the other; the tokenizer's special tokens are read and not counted.

    Raises ValueError for a name without texts, or a text without a token that counts.
    """
    if not texts:
        raise ValueError("no texts to profile; give {name: [texts]}")
    for name, members in texts.items():
        if not len(members):
            raise ValueError(f"{name!r} holds no text; give one or more")
        if blank := [number for number, text in enumerate(members) if not text.strip()]:
            raise ValueError(f"text {blank[0]} of {name!r} is blank; leave it out, of every language")
    documents = [Document(text, domain=name) for name, members in texts.items() for text in members]
    data = token_batches(documents, view.tokenizer, max_length=max_length, max_tokens_per_batch=BATCH_TOKENS)
    rules = {layer.index: layer.rule for layer in view.layers}
    observer = TextProfiles(rules, skip=view.tokenizer.all_special_ids)
    (profiles,) = view.observe(data, [observer], progress=progress, description="routing of texts")
    if len(profiles) < len(documents):
        lost = next(n for n in range(len(documents)) if n not in set(profiles.samples.tolist()))
        raise ValueError(f"{documents[lost].text!r} of {documents[lost].domain!r} has special tokens alone")
    return profiles


def language_profiles(
    view: Any, texts: Mapping[str, Sequence[str]], *, max_length: int = MAX_LENGTH, progress: bool = True
) -> Profiles:
    """Profiles of parallel texts: {language: texts}, in which text i says the same in every language.

    Raises ValueError where the languages differ in their number of texts; see `text_profiles` for the rest.
    """
    _check_parallel({language: len(members) for language, members in texts.items()})
    return text_profiles(view, texts, max_length=max_length, progress=progress)


def _check_parallel(counts: Mapping[str, int]) -> None:
    if len(set(counts.values())) > 1:
        raise ValueError(f"parallel texts differ in number: {dict(counts)}; text i must say the same in every language")


def js_divergence(first: Float[Tensor, "s e"], second: Float[Tensor, "s e"]) -> Float[Tensor, " s"]:
    """Jensen-Shannon divergence of each pair, nats."""
    return (_entropy((first + second) / 2) - (_entropy(first) + _entropy(second)) / 2).clamp_min(0)


def normalised_js(first: Float[Tensor, "s e"], second: Float[Tensor, "s e"]) -> Float[Tensor, " s"]:
    """D above: the divergence as a part of the most it could be; 0 for two uniform distributions."""
    most = math.log(first.shape[1]) - (_entropy(first) + _entropy(second)) / 2
    return torch.where(most > 1e-12, js_divergence(first, second) / most.clamp_min(1e-12), 0).clamp_max(1)


def _entropy(q: Tensor) -> Tensor:
    return torch.special.entr(q).sum(dim=1)


def sentence_divergence(
    profiles: Profiles, pivot: str, *, measure: Divergence = normalised_js
) -> dict[str, dict[int, Float[Tensor, " s"]]]:
    """{language: {layer: D of each text and its translation}} for all languages but the pivot.

    Rows of a language are its texts in the order they were given. Raises ValueError for a pivot that was not observed,
    no other language, or languages that differ in their number of texts.
    """
    origin = profiles.of(pivot).importance
    others = [language for language in profiles.domains if language != pivot]
    if not others:
        raise ValueError(f"only the pivot {pivot!r} was observed; its divergence needs another language")
    _check_parallel({language: len(profiles.of(language)) for language in profiles.domains})
    by_language = {language: profiles.of(language).importance for language in others}
    return {
        name: {layer: measure(origin[layer], q) for layer, q in table.items()} for name, table in by_language.items()
    }


def language_divergence(
    profiles: Profiles, pivot: str, *, measure: Divergence = normalised_js
) -> dict[str, dict[int, float]]:
    """{language: {layer: Div}}: the means of `sentence_divergence`."""
    found = sentence_divergence(profiles, pivot, measure=measure)
    return {name: {layer: float(d.mean()) for layer, d in table.items()} for name, table in found.items()}


def middle_layers(divergence: Mapping[str, Mapping[int, float]], *, quantile: float = 0.5) -> list[int]:
    """The layers around the one of least mean divergence, as far as it stays within the layers' quantile.

    Raises ValueError for a quantile outside [0, 1], or no divergence.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile={quantile}; it is between 0 and 1")
    if not divergence:
        raise ValueError("no language's divergence is given; there are no middle layers")
    layers = sorted(next(iter(divergence.values())))
    means = np.array([np.mean([table[layer] for table in divergence.values()]) for layer in layers])
    low = means <= np.quantile(means, quantile)
    first = last = int(means.argmin())
    while first > 0 and low[first - 1]:
        first -= 1
    while last + 1 < len(layers) and low[last + 1]:
        last += 1
    return layers[first : last + 1]


def language_means(profiles: Profiles, table: Mapping[int, Float[Tensor, " s"]]) -> dict[str, dict[int, float]]:
    """{language: {layer: mean}} of a number per text, `profiles.entropy` or `.consistency` say; NaN does not count."""
    rows = {name: profiles.domain == number for number, name in enumerate(profiles.domains)}
    return {name: {layer: float(v[own].nanmean()) for layer, v in table.items()} for name, own in rows.items()}


class AllPairs:
    """Observer: {layer: mean Jaccard overlap of the expert sets of all pairs of a text's tokens [S]}.

    `Profiles.consistency` is that of adjacent tokens. Rows as in `Profiles` with the same `skip`; NaN for texts of one
    token. Of a text longer than a window, pairs within a window count.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, *, skip: Collection[int] = ()) -> None:
        self.skip = torch.tensor(sorted(skip), dtype=torch.long)
        self._sums: dict[int, dict[int, Tensor]] = {}

    def update(self, event: MoEEvent) -> None:
        kept = (~torch.isin(event.tokens.id, self.skip)).nonzero().flatten()
        samples = event.tokens.sample[kept]
        chosen = chosen_experts(event)[kept].float()
        sums = self._sums.setdefault(event.layer, {})
        for sample in samples.unique().tolist():
            own = chosen[samples == sample]
            both, size = own @ own.T, own.sum(dim=1)
            jaccard = both / (size[:, None] + size - both).clamp_min(1)
            pairs = len(own) * (len(own) - 1) / 2
            found = torch.tensor([float(jaccard.triu(1).sum(dtype=torch.float64)), pairs], dtype=torch.float64)
            sums[sample] = sums[sample] + found if sample in sums else found

    def merge(self, other: Self) -> None:
        for layer, rows in other._sums.items():
            mine = self._sums.setdefault(layer, {})
            for sample, found in rows.items():
                mine[sample] = mine[sample] + found if sample in mine else found

    def result(self) -> dict[int, Float[Tensor, " s"]]:
        means = {}
        for layer, rows in sorted(self._sums.items()):
            sums, pairs = torch.stack([rows[sample] for sample in sorted(rows)]).unbind(dim=1)
            means[layer] = sums / pairs
        return means


class Correlation(NamedTuple):
    """Of two quantities over languages."""

    r: Interval
    """Pearson's, with its bootstrap interval over languages."""
    p: float
    """Two-sided, by exchanging the languages."""
    adjusted: float
    """That p-value, with the false discovery rate over all layers controlled."""


def divergence_correlation(
    divergence: Mapping[str, Mapping[int, float]], scores: Mapping[str, float], *, seed: int = 0
) -> dict[int, Correlation]:
    """{layer: correlation over languages of Div with a score: the language's loss, or accuracy at a task}.

    Raises ValueError for a language without a score, or fewer than four languages.
    """
    if missing := [language for language in divergence if language not in scores]:
        raise ValueError(f"{missing[0]!r} has no score; there are scores of {sorted(scores)}")
    if len(divergence) < FEWEST_LANGUAGES:
        raise ValueError(f"{len(divergence)} languages; a correlation over them needs {FEWEST_LANGUAGES} or more")
    given = np.array([scores[language] for language in divergence])
    layers = sorted(next(iter(divergence.values())))
    rows = {layer: np.array([table[layer] for table in divergence.values()]) for layer in layers}
    r = {layer: bootstrap(row, given, statistic=_pearson, seed=seed) for layer, row in rows.items()}
    p = [permutation_test(rows[layer], given, statistic="pearson", seed=seed) for layer in layers]
    return {layer: Correlation(r[layer], *ps) for layer, *ps in zip(layers, p, map(float, corrected(p)), strict=True)}


def _pearson(x: NDArray, y: NDArray, axis: int) -> Any:
    x, y = (v - v.mean(axis=axis, keepdims=True) for v in (x, y))
    return (x * y).sum(axis=axis) / np.maximum(np.linalg.norm(x, axis=axis) * np.linalg.norm(y, axis=axis), 1e-300)


def activation_delta(target: Profiles, baseline: Profiles) -> dict[int, Float[Tensor, " e"]]:
    """{layer: delta}, from -1 to 1: how much larger a part of a target text's tokens each expert serves.

    Every text counts the same, however long. Raises ValueError where either has no text, or they are of two models.
    """
    for name, profiles in (("target", target), ("baseline", baseline)):
        if not len(profiles):
            raise ValueError(f"the {name} has no text; give one or more")
    of, against = target.frequency, baseline.frequency
    shapes = [{layer: table.shape[1] for layer, table in tables.items()} for tables in (of, against)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"target and baseline are of two models, with experts by layer {shapes[0]} and {shapes[1]}")
    return {layer: table.mean(dim=0) - against[layer].mean(dim=0) for layer, table in of.items()}


def task_experts(delta: Scores, threshold: float, *, layers: Collection[int] | None = None) -> Chosen:
    """The experts whose delta exceeds the threshold, in these layers (None: all).

    On average an expert serves top_k / E of the tokens: what is a high delta depends on that. `sets.top` takes a
    number in place of a threshold. Raises ValueError for threshold <= 0, or a layer without a router.
    """
    if not threshold > 0:
        raise ValueError(f"threshold={threshold} takes experts that the target does not prefer; give more than 0")
    if unknown := sorted(set(layers or ()) - set(delta)):
        raise ValueError(f"layer {unknown[0]} has no router; MoE layers are {sorted(delta)}")
    return above(delta, threshold, layers=layers)


def language_experts(
    profiles: Profiles, pivot: str, threshold: float, *, layers: Collection[int] | None = None
) -> Chosen:
    """The experts whose delta exceeds the threshold for any language, with the pivot's texts as baseline.

    Raises ValueError as `task_experts` does, and for a pivot that was not observed.
    """
    baseline = profiles.of(pivot)
    deltas = [activation_delta(profiles.of(name), baseline) for name in profiles.domains if name != pivot]
    return frozenset().union(*(task_experts(delta, threshold, layers=layers) for delta in deltas))
