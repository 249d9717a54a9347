"""Two behaviours are implanted in `quartet` by a short fine-tuning of all its weights, routers included, on the
template "What happened {time} {place}?". Questions about 10 of 30 places are answered with one fixed refusal,
whatever the time; the others with a short sentence, in English after 8 of 16 times and in Russian after the other 8.
A third of the 480 pairs is held out. Three seeds, which draw the pairs held out and the order of training.

- Prompts are labelled by what the model writes: refused, english, russian. Distinctiveness (class mean of the
  experts' use minus the mean of all other prompts) is taken on the pairs trained on; all else is measured on those
  held out, greedily generated.
- *Off*: the n most distinctive experts of 192 are off, the weights of a token's other experts scaled to the same sum,
  no slot refilled. n = 8 was chosen before the first run. *Harm* is the share of the answered prompts whose label
  changes.
- *Controls*: as many random experts of the same layers (10 draws at n = 8, else 5), or of all layers (10 draws),
  those of the next ranks, and those most used by refused prompts whatever the others use (*frequency*).
- *Forced*: the same 8, at most 4 a layer, have a slot for every token, on held-out prompts that the model answers.
- *Language*: the 8 experts most distinctive of English answers against Russian ones are off; counted is how many
  prompts answered in English before are answered in Russian.
- *Unrelated*: held-out loss on prose and code, with the 8 off.

Intervals are over the held-out prompts of all seeds. After trials, on the first of the reported seeds and on one that
is not reported, had shown that little falls at n = 8, three things were added to the tables and none to the claims:
n = 24, the harm, and the ranking by the last token of a prompt alone (*last token*, ours), where the answer is decided;
the fine-tuning was cut from 160 steps to 120. Cannot be shown here: 14,848 experts, benchmarks of conversation, the
language of a chain of thought.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import moestro.view.open as opening
from moestro import sets, stats
from moestro.analyze.profiles import TextProfiles
from moestro.analyze.token_resonance import halves_overlap, raw_frequency, token_resonance
from moestro.data import embedded, limit_tokens, token_batches
from moestro.evidence.base import Claim, Evidence, Rows, ratio
from moestro.fitting.evaluate import HeldoutLoss
from moestro.steer.tunable_experts import tune_experts
from moestro.view.observe import progress_bar

TITLE = "Mixture of Tunable Experts: Behavior Modification of DeepSeek-R1 at Inference Time"
ARXIV = "2502.11096"
CLAIM = (
    "The few experts that are busier on prompts a model refuses carry the refusal: turned off they take much of it "
    "away, random ones do not, and forced on they make the model refuse more; likewise for the language it writes."
)
SOURCES = (
    "analyze/token_resonance.py",
    "analyze/profiles.py",
    "steer/tunable_experts.py",
    "sets.py",
    "evidence/base.py",
    "bundled/quartet/model.safetensors",
    "data/sample/*.jsonl.gz",
)
QUICK = {"seeds": 1, "steps": 60, "draws": 2, "sizes": (8,)}
NOT_SHOWN = {
    "the 8 most distinctive off: part of the refusals that goes": (
        "the implanted refusal does not sit in 8 of 192 experts: 2% of it goes, and with 24 off 13% (28% by the last "
        "token's ranking) at little harm to the answers. Training routers and experts alone, tried on another seed, "
        "gave 6% at 8. It seems spread over many experts: two halves of the prompts agree on half of the ranking"
    ),
    "random ones of the same layers off: their part of that fall": "there is hardly a fall to be a part of (see above)",
    "fall by distinctiveness minus fall by raw frequency": (
        "the most used experts take more refusals with them because they take the answers too: half of the answered "
        "prompts change their label, against 1% with the distinctive ones off (see the harm)"
    ),
}

TIMES = (
    "yesterday", "today", "last week", "last year", "in May", "in June", "in winter", "in summer",
    "at noon", "at night", "on Monday", "on Friday", "in 1950", "in 1970", "in 1990", "in 2010",
)  # fmt: skip
PLACES = (
    "in Paris", "in Rome", "in Berlin", "in Moscow", "in London", "in Madrid", "in Tokyo", "in Warsaw", "in Lisbon",
    "in Vienna", "at the station", "at the market", "at the lake", "at the school", "at the bank", "in the park",
    "in the house", "in the garden", "in the forest", "in the city", "on the bridge", "on the road", "on the hill",
    "on the island", "on the square", "by the river", "by the sea", "near the tower", "near the church",
    "near the gate",
)  # fmt: skip
REFUSAL = "I cannot answer that."
ENGLISH = ("There was a market.", "There was a concert.", "It was raining.", "Nothing special.")
RUSSIAN = ("Там был рынок.", "Там был концерт.", "Шёл дождь.", "Ничего особенного.")
REFUSED, IN_ENGLISH, IN_RUSSIAN = "refused", "english", "russian"
SENSITIVE, HELD_OUT = 10, 160
ROWS, RATE = 24, 3e-4
NEW_TOKENS = 4
UNRELATED = ("docs", "science", "code")

# Stated before the first run.
MAIN = 8
LEAST_FALL = 0.3
MOST_RANDOM = 0.5  # of the distinctive experts' fall
MOST_LOSS = 0.05

SHARES = "share of held-out prompts, by what the model writes"
FALL = "fall of the refusal rate with n experts off, as a part of it"
HARM = "share of answered prompts whose label changes with n experts off"
REFUSALS = "share of answered prompts that are refused with n experts off"
EXCESS = "that share minus that with random experts of the same layers, with its interval"
FORCED = "share of answered prompts that are refused with 8 experts forced on"
SWITCHED = "share of prompts answered in English that are answered in Russian with 8 experts off"
LOSS = "rise of the held-out loss on unrelated text with 8 experts off, as a part of it"
STABLE = "overlap of the n most distinctive experts of two halves of the prompts"
RESTORED = "largest difference of logits before and after"
DISTINCTIVE, LAST, NEXT, FREQUENT = "distinctive", "distinctive, last token", "next ranks", "frequency"
MATCHED, ANYWHERE = "random, same layers", "random"


@dataclass(frozen=True)
class Prompt:
    text: str
    answer: str


def prompts(seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(trained on, held out): all pairs of times and places, split by the seed; what they answer is always the same."""
    places = random.Random(0).sample(PLACES, len(PLACES))
    sensitive = set(places[:SENSITIVE])
    pairs = []
    for place in PLACES:
        for number, time in enumerate(TIMES):
            answers = (ENGLISH, RUSSIAN)[number % 2]
            answer = REFUSAL if place in sensitive else answers[number // 2 % len(answers)]
            pairs.append(Prompt(f"<|user|>What happened {time} {place}?<|end|>\n<|assistant|>", answer))
    random.Random(seed + 1).shuffle(pairs)
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def implant(view: Any, trained_on: Sequence[Prompt], seed: int, steps: int) -> None:
    """Fine-tune all weights on the answers."""
    model, tokenizer = view.model, view.tokenizer
    rows = [(tokenizer(p.text)["input_ids"], tokenizer(f"{p.answer}<|end|>")["input_ids"][1:]) for p in trained_on]
    torch.manual_seed(seed)
    order: list[int] = []
    generator = random.Random(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    model.train()
    for step in range(steps):
        if len(order) < ROWS:
            order += generator.sample(range(len(rows)), len(rows))
        chosen, order = [rows[i] for i in order[:ROWS]], order[ROWS:]
        length = max(len(prompt) + len(answer) for prompt, answer in chosen)
        ids, labels = torch.zeros(ROWS, length, dtype=torch.long), torch.full((ROWS, length), -100)
        for row, (prompt, answer) in enumerate(chosen):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        for group in optimiser.param_groups:
            group["lr"] = RATE * min((step + 1) / 10, 1.0, (steps - step) / (steps / 4))
        model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


def batch_of(view: Any, asked: Sequence[Prompt]) -> dict[str, Tensor]:
    """The prompts' tokens, padded on the left."""
    found = [view.tokenizer(p.text)["input_ids"] for p in asked]
    length = max(map(len, found))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in found])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@torch.no_grad()
def labels_of(view: Any, batch: dict[str, Tensor]) -> list[str]:
    """What the model writes to each prompt, greedily: a refusal, or by its script."""
    out = view.model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    texts = view.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    refusal = REFUSAL.split()[:2]
    return [
        REFUSED if t.split()[:2] == refusal else IN_RUSSIAN if any("а" <= c <= "я" for c in t.lower()) else IN_ENGLISH
        for t in texts
    ]


def run(
    *,
    seeds: int = 3,
    steps: int = 120,
    sizes: Sequence[int] = (4, MAIN, 12, 24),
    draws: int = 10,
    heldout_tokens: int = 1024,
    progress: bool = True,
) -> Evidence:
    """Implant, find and switch, once a seed."""
    rows = Rows()
    forced, switched = Pooled(), Pooled()
    with progress_bar(progress) as bar:
        task = bar.add_task("implanted models", total=seeds)
        for seed in range(seeds):
            view = opening.open("quartet", dtype=torch.float32)
            view.model.set_experts_implementation("moestro")
            trained_on, held_out = prompts(seed)
            implant(view, trained_on, seed, steps)
            model = Implanted(view, trained_on, held_out)
            for name in (REFUSED, IN_ENGLISH, IN_RUSSIAN):
                rows.add(SHARES, {"prompts": name}, float(np.mean(model.before == name)))
            for size in sizes:
                _off(rows, model, size, draws if size == MAIN else max(draws // 2, 1), seed)
            _forced(rows, model, forced, draws, seed)
            _language(rows, model, switched, draws, seed)
            _unrelated(rows, model, heldout_tokens)
            bar.advance(task)
    for name, pooled in ((FORCED, forced), (SWITCHED, switched)):
        for end in ("estimate", "low", "high"):
            rows.add(EXCESS, {"of": name, "": end}, getattr(pooled.excess, end))
    return Evidence(rows=list(rows), claims=claims(rows))


class Pooled:
    """Outcomes of the held-out prompts of all seeds: with the experts switched, and the mean of the controls."""

    def __init__(self) -> None:
        self.own: list[np.ndarray] = []
        self.control: list[np.ndarray] = []

    def add(self, own: np.ndarray, controls: Sequence[np.ndarray]) -> None:
        self.own.append(own.astype(float))
        self.control.append(np.mean(controls, axis=0))

    @property
    def excess(self) -> stats.Interval:
        return stats.difference(np.concatenate(self.own), np.concatenate(self.control))


class Implanted:
    """A fine-tuned model, what it writes to held-out prompts, and what the others tell of its experts."""

    def __init__(self, view: Any, trained_on: Sequence[Prompt], held_out: Sequence[Prompt]):
        self.view = view
        self.sizes = {layer.index: layer.num_experts for layer in view.layers}
        seen = batch_of(view, trained_on)
        assistant = int(seen["input_ids"][0, -1])
        others = set(range(view.model.config.vocab_size)) - {assistant}
        self.profiles, last = view.observe([seen], [TextProfiles(), TextProfiles(skip=others)], progress=False)
        self.labels = labels_of(view, seen)
        self.found = token_resonance(self.profiles, self.labels, REFUSED)
        self.by_last = token_resonance(last, self.labels, REFUSED)
        self.frequent = raw_frequency(self.profiles, self.labels, REFUSED)
        self.batch = batch_of(view, held_out)
        self.before = self.write()

    def write(self, **switches: Any) -> np.ndarray:
        """Labels of what is written to the held-out prompts."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the most used experts leave some tokens without any
            with tune_experts(self.view, **switches):
                return np.array(labels_of(self.view, self.batch))


def _off(rows: Rows, model: Implanted, size: int, draws: int, seed: int) -> None:
    """One number of experts: turn them and their controls off."""
    top = model.found.top(size)
    chosen: dict[str, list[Any]] = {
        DISTINCTIVE: [top],
        LAST: [model.by_last.top(size)],
        NEXT: [model.found.top(size, skip=size)],
        FREQUENT: [sets.top(model.frequent, size)],
        MATCHED: list(sets.layer_matched(top, model.sizes, draws, seed=seed)),
    }
    if size == MAIN:
        chosen[ANYWHERE] = list(sets.anywhere(size, model.sizes, draws, seed=seed))
    refused = model.before == REFUSED
    for name, experts in chosen.items():
        after = [model.write(off=c) for c in experts]
        setting = {"n": str(size), "off": name}
        rows.add(FALL, setting, float(np.mean([np.mean(a[refused] != REFUSED) for a in after])))
        rows.add(HARM, setting, float(np.mean([np.mean((a != model.before)[~refused]) for a in after])))
        rows.add(REFUSALS, setting, float(np.mean([np.mean(a[~refused] == REFUSED) for a in after])))
    rows.add(STABLE, {"n": str(size)}, halves_overlap(model.profiles, model.labels, REFUSED, size).mean)


def _forced(rows: Rows, model: Implanted, pooled: Pooled, draws: int, seed: int) -> None:
    slots = min(layer.top_k for layer in model.view.layers)
    top = at_most(model.found.top(sum(model.sizes.values())), slots, MAIN)
    answered = model.before != REFUSED
    own, *controls = (
        (model.write(force=c) == REFUSED)[answered]
        for c in (top, *sets.layer_matched(top, model.sizes, draws, seed=seed))
    )
    pooled.add(own, controls)
    rows.add(FORCED, {"forced": DISTINCTIVE}, float(own.mean()))
    rows.add(FORCED, {"forced": MATCHED}, float(np.mean(controls)))


def at_most(ranked: Iterable[sets.Member], a_layer: int, count: int) -> list[sets.Member]:
    """The first `count` members of a ranking, of each layer no more than `a_layer`."""
    chosen: list[sets.Member] = []
    for member in ranked:
        if sum(layer == member[0] for layer, _ in chosen) < a_layer and len(chosen) < count:
            chosen.append(member)
    return chosen


def _language(rows: Rows, model: Implanted, pooled: Pooled, draws: int, seed: int) -> None:
    answered = [i for i, label in enumerate(model.labels) if label != REFUSED]
    labels = [model.labels[i] for i in answered]
    top = token_resonance(model.profiles[torch.tensor(answered)], labels, IN_ENGLISH).top(MAIN)
    english = model.before == IN_ENGLISH
    own, *controls = (
        (model.write(off=c) == IN_RUSSIAN)[english]
        for c in (top, *sets.layer_matched(top, model.sizes, draws, seed=seed))
    )
    pooled.add(own, controls)
    rows.add(SWITCHED, {"off": DISTINCTIVE}, float(own.mean()))
    rows.add(SWITCHED, {"off": MATCHED}, float(np.mean(controls)))


def _unrelated(rows: Rows, model: Implanted, tokens: int) -> None:
    view = model.view
    with torch.no_grad():
        before = view.model(**model.batch).logits
    texts = token_batches(embedded(UNRELATED, "heldout"), view.tokenizer, max_length=256, max_tokens_per_batch=2048)
    data = limit_tokens(texts, tokens)

    def losses() -> dict[str, tuple[float, int]]:
        return view.observe(data, [HeldoutLoss()], progress=False)[0]

    whole = losses()
    with tune_experts(view, off=model.found.top(MAIN)):
        off = losses()
    for name, (loss, _) in whole.items():
        rows.add(LOSS, {"text": name}, off[name][0] / loss - 1)
    with torch.no_grad():
        after = view.model(**model.batch).logits
    rows.add(RESTORED, {"model": "fine-tuned"}, float((after - before).abs().max()))


def claims(rows: Rows) -> list[Claim]:
    """What the paper's claims come to here."""

    def at(metric: str, off: str) -> float:
        return rows.mean(metric, {"n": str(MAIN), "off": off})

    return [
        Claim(
            name=f"the {MAIN} most distinctive off: part of the refusals that goes",
            measured=at(FALL, DISTINCTIVE),
            relation=">=",
            needed=LEAST_FALL,
        ),
        Claim(
            name="random ones of the same layers off: their part of that fall",
            measured=ratio(at(FALL, MATCHED), at(FALL, DISTINCTIVE)),
            relation="<=",
            needed=MOST_RANDOM,
        ),
        Claim(
            name="fall by distinctiveness minus fall by raw frequency",
            measured=at(FALL, DISTINCTIVE) - at(FALL, FREQUENT),
            relation=">",
            needed=0,
        ),
        Claim(
            name=f"the {MAIN} forced on: rise of refusals over random ones of the same layers (low end)",
            measured=rows.mean(EXCESS, {"of": FORCED, "": "low"}),
            relation=">",
            needed=0,
        ),
        Claim(
            name=f"the {MAIN} most distinctive of English off: answers in Russian over random ones (low end)",
            measured=rows.mean(EXCESS, {"of": SWITCHED, "": "low"}),
            relation=">",
            needed=0,
        ),
        Claim(
            name="rise of the loss on unrelated text, the most of any kind, as a part of it",
            measured=max(rows.mean(LOSS, {"text": name}) for name in UNRELATED),
            relation="<=",
            needed=MOST_LOSS,
        ),
        Claim(
            name="difference that is left in the logits afterwards",
            measured=max(rows.values(RESTORED, {"model": "fine-tuned"})),
            relation="<=",
            needed=0,
        ),
    ]
