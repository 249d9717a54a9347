"""Section on attention heads: which of them copy what the model looks up in its context."""

from __future__ import annotations

from itertools import islice

import numpy as np
from numpy.typing import NDArray

from moestro import stats
from moestro.analyze.retrieval_heads import THRESHOLD, RetrievalScores, retrieval_scores
from moestro.data.needles import code_needles, needle_runs
from moestro.looking.collect import Collected
from moestro.looking.result import Heat, Listing, Section

TITLE = "Retrieval heads: who looks things up"
LENGTHS = (128, 256, 512)
NEEDLES, DEPTHS, ANSWER = 2, 5, 5
NEW_TOKENS = 8
HAYSTACK_WINDOWS = 64
LEAST_ANSWERED = 8
"""Prompts that must be answered before heads are scored by them. Our choice."""
PASS = (
    "This needs prompts of its own, so the model ran a second time: {runs} prompts of {lengths} tokens, each of which "
    "hides a random code of {answer} words in texts of {reference}, and asks for it."
)


def heads_section(seen: Collected, *, progress: bool = True) -> Section:
    """Scores of all heads on needles hidden in the data's own texts, in a pass of their own."""
    view = seen.view
    if view.streamed:
        return _absent("Answers are not generated while a model is streamed from disk.")
    try:
        context = getattr(view.model.config.get_text_config(), "max_position_embeddings", None) or LENGTHS[-1]
        lengths = [n for n in LENGTHS if n + NEW_TOKENS <= context][:2]
        if not lengths:
            raise ValueError(
                f"the model has {context} positions, and the shortest prompt takes {LENGTHS[0] + NEW_TOKENS}"
            )
        needles = code_needles(view.tokenizer, NEEDLES, tokens=ANSWER, seed=seen.seed)
        runs = needle_runs(view.tokenizer, haystack(seen), needles, lengths=lengths, depths=DEPTHS, seed=seen.seed)
        scores = retrieval_scores(view, runs, max_new_tokens=NEW_TOKENS, progress=progress)
    except ValueError as e:
        return _absent(f"Retrieval heads were not looked for: {e}.")
    answered = int((scores.answers.recall > scores.success).sum())
    if answered < LEAST_ANSWERED:
        return _absent(
            f"Heads are scored by prompts that the model answers, and it answers {answered} of {len(runs)}; "
            f"{LEAST_ANSWERED} are the least. Each hides a random code in a text and asks for it, which small models "
            "seldom can answer."
        )
    note = PASS.format(runs=len(runs), lengths=" and ".join(map(str, lengths)), answer=ANSWER, reference=seen.reference)
    return scored_section(scores, note, seed=seen.seed)


def haystack(seen: Collected) -> list[str]:
    """Texts of the reference domain, as the tokenizer writes them."""
    batches = seen.batches
    number = batches.domains.index(seen.reference)
    windows = (w for rows in batches.plan for w in rows if batches.domain[w] == number)
    return [
        seen.view.tokenizer.decode(
            batches.token_ids[batches.offset[w] : batches.offset[w] + batches.length[w]], skip_special_tokens=True
        )
        for w in islice(windows, HAYSTACK_WINDOWS)
    ]


def scored_section(scores: RetrievalScores, note: str, *, seed: int = 0) -> Section:
    """The section of a model that answers."""
    table = scores.table()
    heads = scores.heads()
    answered = int(scores.answered.sum())
    findings = [
        f"{len(heads)} of {len(table)} heads copy {THRESHOLD:.0%} or more of the answer; the model answers {answered} "
        f"of {len(scores.answers.runs)} prompts."
    ]
    if control := _on_other_runs(scores, seed):
        chosen, rest, count = control
        findings.append(
            f"The {count} heads found on one half of the answered prompts copy {chosen} of the answers of the other "
            f"half, all other heads {rest}."
        )
    heat = Heat(
        name="heads",
        title="Score of every head",
        read="A row is a layer, a column a query head, the colour the share of the answer's tokens that the head "
        f"points at when the model writes them: from {THRESHOLD:g} on it is a retrieval head.",
        table=table.sort("layer", "head"),
        row="layer",
        column="head",
        value="score",
        steps=(0.02, 0.05, THRESHOLD, 0.3, 0.6),
        unit="share of the answer",
    )
    listing = Listing(
        name="heads-best",
        title="The best heads",
        read="Score with its 95% interval over prompts; frequency is the share of prompts in which the head copies at "
        "all.",
        table=table.head(12),
    )
    return Section("heads", TITLE, tuple(findings), (heat, listing), note=note)


def _on_other_runs(scores: RetrievalScores, seed: int) -> tuple[stats.Interval, stats.Interval, int] | None:
    """(score of the heads found on runs of even number, of all others, how many) on those of odd number."""
    answered = scores.answered.nonzero().flatten()
    if len(answered) < 4:
        return None
    found = scores.of(answered[::2].tolist()).heads()
    other = scores.of(answered[1::2].tolist())
    if not found or len(found) == sum(row.shape[1] for row in other.per_run.values()):
        return None
    inside: list[NDArray] = []
    outside: list[NDArray] = []
    for layer, rows in other.per_run.items():
        for head in range(rows.shape[1]):
            (inside if (layer, head) in found else outside).append(rows[:, head].numpy())
    means = [np.nanmean(np.stack(part), axis=0) for part in (inside, outside)]
    return (*(stats.bootstrap(m, seed=seed) for m in means), len(found))  # type: ignore[return-value]


def _absent(reason: str) -> Section:
    return Section("heads", TITLE, absent=reason)
