"""Retrieval heads: the few attention heads that copy what a model looks up in its context.

    runs = needle_runs(view.tokenizer, texts, code_needles(view.tokenizer, 3), lengths=(128, 256, 512))
    scores = retrieval_scores(view, runs)
    scores.top(10), scores.heads(0.1), scores.table()
    masking(view, fresh_runs, scores, counts=(5, 10))            what the model loses with them, and with random heads

While the model writes its answer greedily, the attention row of the newest query is read at every step. Head h copies
where that row is largest at a place j inside the needle and token j is the very token that this step generates. With
g_h the tokens it copies in a run and k the tokens of the answer,

    score of h = |g_h and k| / |k|, mean over the runs that the model answers

and its frequency is the share of these runs in which it copies at all: a head of high frequency and low score copies
some things and not others. Of the prefill only the last query's row is computed, so long prompts cost little.

"Retrieval Head Mechanistically Explains Long-Context Factuality" (arXiv:2404.15574).
Shapes: R runs, A query heads, G key-value heads, B rows, T steps, S keys, K different tokens of an answer, D draws.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import GenerationConfig

from moestro import sets, stats
from moestro.data.needles import NeedleRun
from moestro.view.heads import HeadEdit, HeadEvent, HeadId, HeadMask
from moestro.view.observe import progress_bar

THRESHOLD = 0.1  # the paper's
SUCCESS = 0.5  # recall of the answer's tokens above which a run counts: the official code's
NEW_TOKENS = 50  # the official code's
BATCH_TOKENS = 8192
ON_FIRST = 0.5  # share of attention's largest entries on the first token that makes a failure a "hallucination"

Failure = Literal["incomplete", "hallucination", "wrong place", "not copied"]


@dataclass(frozen=True)
class Answers:
    """What the model wrote in each run, up to a stop token."""

    runs: Sequence[NeedleRun]
    outputs: list[list[int]]

    @property
    def exact(self) -> Bool[Tensor, " r"]:
        """Whether the output begins with the answer."""
        return torch.tensor([tuple(o[: len(r.answer)]) == r.answer for r, o in zip(self.runs, self.outputs)])

    @property
    def recall(self) -> Float[Tensor, " r"]:
        """Share of the answer's different tokens that are in the output (ROUGE-1 recall)."""
        return torch.tensor([len({*r.answer} & {*o}) / len({*r.answer}) for r, o in zip(self.runs, self.outputs)])


@dataclass(frozen=True)
class RetrievalScores:
    """Scores by layer of every head in every run; summaries are over the runs that the model answers."""

    answers: Answers
    success: float
    per_run: dict[int, Float[Tensor, "r a"]]
    """NaN where a layer's sliding window does not reach the needle."""
    copies: dict[int, Bool[Tensor, "r a"]]
    """Whether the head copied any token of the needle."""
    on_first: dict[int, Float[Tensor, "r a"]] = field(repr=False)
    """Share of steps at which the head looks at the first token most."""
    in_needle: dict[int, Float[Tensor, "r a"]] = field(repr=False)
    """Share of steps at which it looks into the needle most."""
    windows: dict[int, int] = field(default_factory=dict)
    """{layer: width of its sliding window}, for those that have one"""

    @property
    def answered(self) -> Bool[Tensor, " r"]:
        """Runs that count. Raises ValueError where there are none."""
        counted = self.answers.recall > self.success
        if not counted.any():
            raise ValueError(
                f"the model answers none of the {len(counted)} runs (recall > {self.success}), and heads are scored by "
                "right answers alone; ask shorter prompts or easier needles, or tune the model to answer"
            )
        return counted

    @property
    def mean(self) -> dict[int, Float[Tensor, " a"]]:
        """{layer: score of every head}; NaN for layers whose window reaches no needle."""
        return {layer: scores[self.answered].nanmean(dim=0) for layer, scores in self.per_run.items()}

    @property
    def frequency(self) -> dict[int, Float[Tensor, " a"]]:
        """{layer: share of the runs in which each head copies}"""
        return {layer: found[self.answered].float().mean(dim=0) for layer, found in self.copies.items()}

    def heads(self, threshold: float = THRESHOLD) -> sets.Chosen:
        """The retrieval heads: score at least `threshold`."""
        return frozenset(
            (layer, h) for layer, row in self.mean.items() for h in (row >= threshold).nonzero().flatten().tolist()
        )

    def top(self, count: int) -> list[HeadId]:
        """The heads of largest score, best first."""
        return sets.top(self.mean, count)

    def of(self, chosen: Sequence[int] | Bool[Tensor, " r"]) -> RetrievalScores:
        """The scores of some runs alone: halves, needles, lengths, to see how far contexts matter."""
        index = torch.as_tensor(chosen)
        numbers = (index.nonzero().flatten() if index.dtype == torch.bool else index).tolist()
        answers = Answers([self.answers.runs[i] for i in numbers], [self.answers.outputs[i] for i in numbers])
        per_run, copies, on_first, in_needle = (
            {layer: rows[numbers] for layer, rows in table.items()}
            for table in (self.per_run, self.copies, self.on_first, self.in_needle)
        )
        return RetrievalScores(answers, self.success, per_run, copies, on_first, in_needle, self.windows)

    def key_value_groups(self, view: Any) -> dict[int, Float[Tensor, " g"]]:
        """{layer: score of each key-value head}, the largest of the query heads that read it: for caches."""
        return {layer.index: self.mean[layer.index].view(layer.kv_heads, -1).amax(dim=1) for layer in view.heads}

    def table(self) -> pl.DataFrame:
        """A row for each head: layer, head, score, the ends of its 95% interval over runs, frequency; best first."""
        answered, mean, frequency = self.answered, self.mean, self.frequency
        rows = []
        for layer, scores in self.per_run.items():
            seen = scores[answered]
            seen = seen[~seen.isnan().any(dim=1)]
            ends = [(float("nan"), float("nan"))] * scores.shape[1]
            if len(seen) > 1:
                sums = torch.cat([seen, torch.ones(len(seen), 1)], dim=1)
                found = stats.bootstrap_totals(sums.numpy(), lambda s: s[:, :-1] / s[:, -1:])
                ends = [(interval.low, interval.high) for interval in found]
            for h in range(scores.shape[1]):
                rows.append((layer, h, float(mean[layer][h]), *ends[h], float(frequency[layer][h])))
        names = ["layer", "head", "score", "low", "high", "frequency"]
        return pl.DataFrame(rows, schema=names, orient="row").sort("score", descending=True, nulls_last=True)

    def failures(self, heads: Collection[HeadId] | None = None) -> dict[int, Failure]:
        """{run that is not answered exactly: what the heads (None: the retrieval heads) did in it}

        "incomplete": a part of the answer was found. Else, by where the heads look most: "hallucination", at the first
        token, which serves as a sink; "wrong place", outside the needle; "not copied", at the needle, in vain.
        """
        chosen = sorted(self.heads() if heads is None else heads)
        if not chosen:
            raise ValueError(f"no head has a score of {THRESHOLD}; name the heads to look at")
        first = torch.stack([self.on_first[layer][:, h] for layer, h in chosen]).mean(dim=0)
        inside = torch.stack([self.in_needle[layer][:, h] for layer, h in chosen]).mean(dim=0)
        kinds: dict[int, Failure] = {}
        for run in (~self.answers.exact).nonzero().flatten().tolist():
            if self.answers.recall[run] > 0:
                kinds[run] = "incomplete"
            elif first[run] >= ON_FIRST:
                kinds[run] = "hallucination"
            else:
                kinds[run] = "wrong place" if inside[run] < 1 - inside[run] else "not copied"
        return kinds


class NewestLook:
    """Observer: where each head's newest query looks most, in token positions; under `generate`, step by step."""

    needs = frozenset({"last_patterns"})

    def __init__(self) -> None:
        self._passes: dict[int, list[list[Tensor]]] = {}

    def update_heads(self, event: HeadEvent) -> None:
        passes = self._passes.setdefault(event.layer, [])
        if event.call.prefill:
            passes.append([])
        column = event.last_pattern.argmax(dim=-1).cpu()
        passes[-1].append(event.call.key_position.gather(1, column).int())

    def clear(self) -> None:
        """Forget the prompts seen so far."""
        self._passes.clear()

    def merge(self, other: Self) -> None:
        for layer, passes in other._passes.items():
            self._passes.setdefault(layer, []).extend(passes)

    def result(self) -> dict[int, list[Tensor]]:
        """{layer: for each prompt batch, positions [B, T, A]}"""
        return {layer: [torch.stack(p, dim=1) for p in passes] for layer, passes in sorted(self._passes.items())}


def retrieval_scores(
    view: Any,
    runs: Sequence[NeedleRun],
    *,
    max_new_tokens: int = NEW_TOKENS,
    success: float = SUCCESS,
    stop: Collection[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> RetrievalScores:
    """Let the model answer every run and score its heads. `stop`: token ids that end an answer; None: a line's end.

    Raises ValueError for prompts beyond the model's positions, or layers whose patterns cannot be read.
    """
    tables: dict[str, dict[int, list[Tensor]]] = {"score": {}, "copies": {}, "first": {}, "inside": {}}
    outputs: dict[int, list[int]] = {}
    windows = {
        layer.index: int(width) for layer in view.heads if (width := getattr(layer.module, "sliding_window", None))
    }
    order: list[int] = []
    look = NewestLook()
    for numbers, written in _decoded(view, runs, max_new_tokens, stop, batch_tokens, progress, look):
        order += numbers
        outputs |= dict(zip(numbers, written))
        chosen = [runs[i] for i in numbers]
        for layer, (positions,) in look.result().items():
            for name, value in _scored(chosen, written, positions, windows.get(layer)).items():
                tables[name].setdefault(layer, []).append(value)
        look.clear()
    back = torch.tensor(order).argsort()
    score, copies, first, inside = (
        {layer: torch.cat(parts)[back] for layer, parts in table.items()} for table in tables.values()
    )
    answers = Answers(runs, [outputs[i] for i in range(len(runs))])
    return RetrievalScores(answers, success, score, copies, first, inside, windows)


def _scored(
    runs: Sequence[NeedleRun], written: Sequence[list[int]], positions: Tensor, window: int | None
) -> dict[str, Tensor]:
    """Of one batch and layer: the tables [B, A] of the heads, from where they look, [B, T, A]."""
    steps = positions.shape[1]
    token = torch.tensor([[*o, *[-1] * steps][:steps] for o in written])[:, :, None]
    step = torch.arange(steps)[None, :, None] < torch.tensor([max(len(o), 1) for o in written])[:, None, None]
    prompt = torch.tensor([r.prompt for r in runs])
    start, end = torch.tensor([r.needle for r in runs]).T[:, :, None, None]
    inside = (positions >= start) & (positions < end) & step
    at = prompt.gather(1, positions.long().clamp(0, prompt.shape[1] - 1).flatten(1)).view_as(positions)
    copied = inside & (at == token)
    score = torch.stack(
        [
            sum(((w == x) & hit).any(dim=0).float() for x in {*r.answer}) / len({*r.answer})
            for r, w, hit in zip(runs, token, copied)
        ]
    )
    if window is not None:
        out_of_sight = torch.tensor([r.length - r.needle[0] > window for r in runs])
        score[out_of_sight] = float("nan")
    taken = step.sum(dim=1)
    return {
        "score": score,
        "copies": copied.any(dim=1),
        "first": ((positions == 0) & step).sum(dim=1) / taken,
        "inside": inside.sum(dim=1) / taken,
    }


def answer_runs(
    view: Any,
    runs: Sequence[NeedleRun],
    *edits: Any,
    max_new_tokens: int = NEW_TOKENS,
    stop: Collection[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Answers:
    """What the model answers, with the edits in force."""
    outputs: dict[int, list[int]] = {}
    with view.edits(*edits):
        for numbers, written in _decoded(view, runs, max_new_tokens, stop, batch_tokens, progress):
            outputs |= dict(zip(numbers, written))
    return Answers(runs, [outputs[i] for i in range(len(runs))])


def _decoded(
    view: Any,
    runs: Sequence[NeedleRun],
    max_new_tokens: int,
    stop: Collection[int] | None,
    batch_tokens: int,
    progress: bool,
    *observers: NewestLook,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """(numbers of runs, what the model wrote in them), in batches of one length."""
    if not runs:
        raise ValueError("there are no runs to answer")
    limit = getattr(view.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(r.length for r in runs) + max_new_tokens
    if limit is not None and longest > limit:
        raise ValueError(
            f"a prompt of {longest - max_new_tokens} tokens and max_new_tokens={max_new_tokens} come to {longest}; the "
            f"model has {limit} positions: ask for shorter prompts"
        )
    ends = _stop_tokens(view) if stop is None else frozenset(stop)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=sorted(ends) or None,
    )
    with progress_bar(progress) as bar:
        task = bar.add_task("answering", total=len(runs))
        for length in sorted({r.length for r in runs}):
            same = [i for i, r in enumerate(runs) if r.length == length]
            rows = max(1, batch_tokens // length)
            for numbers in (same[i : i + rows] for i in range(0, len(same), rows)):
                ids = torch.tensor([runs[i].prompt for i in numbers], device=view.device)
                with view.observing(*observers):
                    out = view.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
                written = [_until(row, ends) for row in out[:, length:].tolist()]
                yield numbers, written
                bar.advance(task, len(numbers))


def _until(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    last = next((i for i, t in enumerate(tokens) if t in ends), len(tokens))
    return list(tokens[:last])


def _stop_tokens(view: Any) -> frozenset[int]:
    """The end of a text, and of a line where that is one token."""
    ends = getattr(view.model.generation_config, "eos_token_id", None)
    found = {ends} if isinstance(ends, int) else set(ends or ())
    if view.tokenizer is not None:
        line = view.tokenizer("\n", add_special_tokens=False)["input_ids"]
        found |= set(line) if len(line) == 1 else set()
    return frozenset(found)


@dataclass(frozen=True)
class Masking:
    """Exact answers with `count` heads masked: those of largest score, and random others."""

    count: int
    whole: Bool[Tensor, " r"]
    top: Bool[Tensor, " r"]
    matched: Bool[Tensor, "d r"]
    """Random sets with as many heads in each layer."""
    anywhere: Bool[Tensor, "d r"]
    """Random sets of all layers."""

    def drop(self, of: Literal["top", "matched", "anywhere"] = "top") -> stats.Interval:
        """Share of the runs that is lost, with its interval over runs; of random sets their mean."""
        left = getattr(self, of).float()
        return stats.difference(self.whole.float().numpy(), (left if of == "top" else left.mean(dim=0)).numpy())


def masking(
    view: Any,
    runs: Sequence[NeedleRun],
    scores: RetrievalScores,
    counts: Iterable[int],
    *,
    mode: Literal["uniform", "zero"] = "uniform",
    draws: int = 5,
    seed: int = 0,
    max_new_tokens: int = NEW_TOKENS,
    progress: bool = True,
) -> list[Masking]:
    """What masking the heads of largest score costs, on runs that should not be those that gave the scores.

    "uniform", the official code's way: the heads average what they may see. None of the random heads is among the
    `count`, and of those drawn anywhere none is a retrieval head.
    """

    def exact(*edits: HeadEdit) -> Tensor:
        return answer_runs(view, runs, *edits, max_new_tokens=max_new_tokens, progress=progress).exact

    whole, sizes = exact(), view.num_heads
    points = []
    for count in counts:
        chosen = scores.top(count)
        matched = sets.layer_matched(chosen, sizes, draws, seed=seed)
        anywhere = sets.anywhere(count, sizes, draws, seed=seed, avoid=scores.heads() | set(chosen))
        of_random = [torch.stack([exact(HeadMask(heads, mode)) for heads in drawn]) for drawn in (matched, anywhere)]
        points.append(Masking(count, whole, exact(HeadMask(chosen, mode)), *of_random))
    return points


def similarity(first: sets.Scores, second: sets.Scores, *, seed: int = 0) -> tuple[float, float]:
    """Pearson correlation of two maps of scores, and its p-value against heads exchanged at random.

    Raises ValueError for maps of different heads; heads without a score in either are left out.
    """
    if {n: len(row) for n, row in first.items()} != {n: len(row) for n, row in second.items()}:
        raise ValueError("the two maps are of different heads")
    a, b = (torch.cat([scores[layer] for layer in sorted(scores)]).double().numpy() for scores in (first, second))
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if len(a) < 3 or not a.std() or not b.std():
        raise ValueError(f"{len(a)} heads whose scores vary in both maps; a correlation needs three, and a spread")
    p = stats.permutation_test(a, b, statistic="pearson", alternative="greater", seed=seed)
    return float(np.corrcoef(a, b)[0, 1]), p
