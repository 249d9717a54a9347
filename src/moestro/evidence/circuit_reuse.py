"""`quartet` gets two in five of simple questions on coloured objects right ("On the table, the key is blue, the cup is
red, the lamp is pink. What color is the cup? / The cup is" -> red). Copies of it are tuned, one a seed: on indirect
objects ("When the doctor and the sailor went to the market, the sailor gave a lamp to the" -> doctor) and on 32 facts
to be known by heart until both are right, and on coloured objects only at times when fewer than half of some validation
prompts are. So the model does one task well and its relative by halves, as the paper's. Words that matter are nouns of
one token; the loss is on the answer alone.

- *Circuits*: heads traced by path patching on 24 minimal pairs of each task (see analyze/path_patching.py): to the
  logits, to the queries of what that finds, and to the values of what that finds from the repeated noun or the fact's
  subject. 3 of 36 heads are kept at every stage (the paper: 2% of 384); overlap is shown against that share too, beside
  its exact distribution for random circuits with as many heads in each layer.
- *Ablation*: the heads that both circuits hold are given their mean output, and 5 layer-matched random sets; accuracy
  on 128 other prompts. Shared heads were chosen with the coloured-objects circuit in sight, so the whole circuit of
  indirect objects, chosen without it, stands beside them, and the heads of coloured objects alone.
- *Repair*: the 4 heads of largest effect on the movers' queries in indirect objects are made to attend to the two
  wrong colours, half each, at the prompt's last token; beside it 5 random choices of 4 heads.

The overlap of the two tasks is larger than chance gives (p < 0.05) in two seeds of three. That it exceeds the control's
holds on average and by little: in one seed of three it is smaller, and coloured objects share as much with facts (see
the table). With up to 9 heads of 36 in a circuit, overlap tells little; the ablation tells more. Roles are names for
where a head looks, no more.

± is the standard deviation over seeds; intervals are 95% over prompts, within a seed. The wording and the rate of
tuning were chosen by accuracy alone, before any circuit was traced: the paper's wording ("a red cup") stayed at chance
among the listed colours through 150 steps of tuning on it. A first trace on a copy of another seed, which had lost
coloured objects to the tuning, led to keeping them at a half; claims and thresholds stayed as they were.

Not tried here, for want of a model: the numbers of GPT-2 Medium and its larger relatives. Indirect objects were tuned
for, not learned as a by-product of much text.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moestro.view.open as opening
from moestro import sets, stats
from moestro.analyze.circuits import Circuit, Stage, attention_from, circuit_overlap, circuit_table, trace_circuit
from moestro.analyze.path_patching import PathEffects, answers_of
from moestro.data.minimal_pairs import (
    MinimalPairs,
    Wording,
    colored_objects_pairs,
    fact_pairs,
    ioi_pairs,
    single_token_words,
)
from moestro.data.tasks import COLOURS, WORDS
from moestro.evidence.base import Claim, Evidence, Rows
from moestro.view.heads import ForcePattern, HeadMask, HeadMeans
from moestro.view.observe import progress_bar

TITLE = "Circuit Component Reuse Across Tasks in Transformer Language Models"
ARXIV = "2310.08744"
CLAIM = (
    "Two tasks that look different are done by largely the same attention heads, and a model that does one of them "
    "badly does better when its heads are made to act as in the other."
)
SOURCES = (
    "analyze/circuits.py",
    "analyze/path_patching.py",
    "data/minimal_pairs.py",
    "evidence/base.py",
    "bundled/quartet/model.safetensors",
)
QUICK = {"seeds": 1, "pairs": 8, "prompts": 48, "draws": 2, "most_steps": 60}
NOT_SHOWN = {
    "coloured objects gained by the repair, more than by the best of 5 random choices": (
        "the defect that the paper repairs is not there: in every seed the three strongest heads into the movers' "
        "queries look at the repeated noun in coloured objects as in indirect objects, and there is no negative mover. "
        "Made to look at the wrong colours, the heads no longer tell the movers, it seems, which object is asked for: "
        "the movers' attention to the right colour falls by 36 to 43 points, and all answers are lost"
    ),
}

PEOPLE: tuple[str, ...] = (
    *("doctor", "teacher", "farmer", "driver", "sailor", "painter", "singer", "writer", "friend", "sister", "brother"),
    *("mother", "father", "child", "tiger", "rabbit", "eagle", "horse", "wolf", "bear", "fox", "deer", "goat", "mouse"),
)
PLACES = ("market", "village", "castle", "island", "forest", "garden", "city", "bridge")
THINGS: tuple[str, ...] = (
    *("pencil", "cup", "key", "plate", "bowl", "watch", "lamp", "clock", "paper", "bottle", "knife", "fork", "spoon"),
    *("chain", "rope", "basket", "button", "ladder", "mirror", "hammer", "needle", "carpet", "pillow", "candle"),
)
SURFACES = ("table", "floor", "road", "grass", "street")
TEMPLATES = (
    "When the{A} and the{B} went to the{place}, the{S2} gave a{gift} to the",
    "The{A} and the{B} had a long day at the{place}, and the{S2} handed a{gift} to the",
)
WORDING = Wording(
    opening="On the{surface},",
    item=" the{object} is{color}",
    next=", the{object} is{color}",
    last=", the{object} is{color}",
    question=". What color is the{asked}?\nThe{again} is",
)
HOME = "The home of the{subject} is the"
FACTS = 32
IOI, COLORED, FACT = "indirect objects", "coloured objects", "facts"
STAGES = {
    IOI: [Stage(), Stage("q"), Stage("v", at="S2")],
    COLORED: [Stage(), Stage("q"), Stage("v", at="again")],
    FACT: [Stage(), Stage("q"), Stage("v", at="subject")],
}
SHARE = 3 / 36
SHARES = (1 / 36, 2 / 36, SHARE, 4 / 36, 6 / 36, 9 / 36)
REPAIRED = 4  # heads: three inhibition heads and a negative mover in the paper
NEEDED = {IOI: 0.97, COLORED: 0.5, FACT: 0.97}

# Thresholds, stated before the first run.
ABLATION, REPAIR = 0.2, 0.05

RIGHT = "share of prompts answered right"
OVERLAP = "heads in both circuits over heads in either"
CHANCE, CHANCE_HIGH = "... by chance: mean", "... by chance: 95th percentile"
P = "... p-value against chance"
LOST = "share of coloured-objects prompts lost by ablation"
LOST_LOW = "share of coloured-objects prompts lost by ablation: low end of the 95% interval"
GAINED = "share of coloured-objects prompts gained by attention to the wrong colours"
GAINED_LOW = "share of coloured-objects prompts gained by attention to the wrong colours: low end of the 95% interval"
MOVED = "change of the movers' attention by the repair"
ROLES = "heads of the circuit by what they look at"
SHARED, WHOLE, MATCHED, ALONE = "shared heads", "circuit of indirect objects", "layer-matched", "coloured objects alone"
BEST_RANDOM = "best of random 4"


def run(
    *,
    model: str = "quartet",
    seeds: int = 3,
    pairs: int = 24,
    prompts: int = 128,
    draws: int = 5,
    most_steps: int = 100,
    progress: bool = True,
) -> Evidence:
    """Tune a copy a seed, trace three circuits in it, ablate and repair."""
    rows = Rows()
    original = opening.open(model)
    with progress_bar(progress) as bar:
        task = bar.add_task("tuned copies", total=seeds)
        for seed in range(seeds):
            view = opening.open(copy.deepcopy(original.model).float(), tokenizer=original.tokenizer)
            tasks = _tasks(view.tokenizer, seed)
            if not seed:
                for name, made in tasks.items():
                    rows.add(RIGHT, {"model": "quartet as it is", "task": name}, right(view, made(prompts, 3)))
            tune(view, tasks, seed, most_steps)
            _measure(rows, view, tasks, pairs, prompts, draws, seed)
            bar.advance(task)
    return Evidence(rows=list(rows), claims=claims(rows))


Makers = dict[str, Callable[[int, int], MinimalPairs]]
"""{task: (number of pairs, seed) -> pairs}"""


def _tasks(tokenizer: Any, seed: int) -> Makers:
    people, places, things, colors, surfaces = (
        single_token_words(tokenizer, words) for words in (PEOPLE, PLACES, THINGS, COLOURS, SURFACES)
    )
    words = random.Random(f"facts {seed}").sample(single_token_words(tokenizer, WORDS), 2 * FACTS)
    facts = dict(zip(words[:FACTS], words[FACTS:], strict=True))
    return {
        IOI: lambda n, s: ioi_pairs(
            tokenizer, n, names=people, places=places, gifts=things, templates=TEMPLATES, seed=1000 * seed + s
        ),
        COLORED: lambda n, s: colored_objects_pairs(
            tokenizer,
            n,
            colors=colors,
            objects=things,
            surfaces=surfaces,
            wording=WORDING,
            shots=0,
            capital=False,
            seed=1000 * seed + s,
        ),
        FACT: lambda n, s: fact_pairs(tokenizer, facts, n, template=HOME, seed=1000 * seed + s),
    }


def right(view: Any, pairs: MinimalPairs, *edits: Any) -> float:
    """Share of the prompts whose answer is the likeliest token."""
    return float(answers_of(view, pairs, *edits).right.float().mean())


def tune(view: Any, tasks: Makers, seed: int, most_steps: int) -> None:
    """Train on each task while fewer of its validation prompts are right than NEEDED.

    AdamW, 1e-3 after 10 steps of warm-up; what is right is looked at every third step.
    """
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(view.model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warm = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 10))
    sizes = {IOI: 24, COLORED: 16, FACT: 32}
    check = {name: tasks[name](64, 1) for name in sizes}
    known = dict.fromkeys(sizes, 0.0)
    for step in range(most_steps):
        view.model.train()
        for name, count in sizes.items():
            if known[name] < NEEDED[name]:
                batch = tasks[name](count, 100 + step)
                logits = _logits(view.model, batch)
                F.cross_entropy(logits, batch.answers[:, 0]).backward()
        torch.nn.utils.clip_grad_norm_(view.model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        warm.step()
        if step % 3 == 2:
            view.model.eval()
            known = {name: right(view, pairs) for name, pairs in check.items()}
            if all(known[name] >= needed for name, needed in NEEDED.items()):
                break
    view.model.eval()


def _logits(model: Any, pairs: MinimalPairs) -> Tensor:
    """[B, V] after the prompts."""
    hidden = model.model(input_ids=pairs.clean, attention_mask=pairs.mask.long(), use_cache=False)[0]
    return model.lm_head(hidden[torch.arange(len(pairs)), pairs.positions["last"]])


def _measure(rows: Rows, view: Any, tasks: Makers, pairs: int, prompts: int, draws: int, seed: int) -> None:
    test = {name: made(prompts, 3) for name, made in tasks.items()}
    for name, given in test.items():
        rows.add(RIGHT, {"model": "tuned", "task": name}, right(view, given))
    made = {name: tasks[name](pairs, 2) for name in tasks}
    circuits = {name: trace_circuit(view, made[name], STAGES[name], share=SHARE, progress=False) for name in tasks}
    sizes = view.num_heads
    for one, two in ((IOI, COLORED), (IOI, FACT), (COLORED, FACT)):
        for share in SHARES:
            found = circuit_overlap(circuits[one].heads(share), circuits[two].heads(share), sizes)
            setting = {"heads kept at each stage": f"{share:.0%}", "tasks": f"{one} and {two}"}
            for metric, value in ((OVERLAP, found.value), (CHANCE, found.null_mean), (P, found.p)):
                rows.add(metric, setting, value)
            rows.add(CHANCE_HIGH, setting, found.null_high)
    _roles(rows, view, made, circuits)
    _ablate(rows, view, test[COLORED], circuits, draws, seed)
    _repair(rows, view, made[IOI], circuits[IOI], test[COLORED], draws, seed)


def _roles(rows: Rows, view: Any, made: dict[str, MinimalPairs], circuits: dict[str, Circuit]) -> None:
    for name in (IOI, COLORED):
        roles = circuit_table(view, made[name], circuits[name])["role"].to_list()
        for role in ("mover", "negative mover", "inhibition", "duplicate token", "induction", "content gatherer", ""):
            rows.add(ROLES, {"task": name, "role": role or "other"}, float(roles.count(role)))


def _ablate(rows: Rows, view: Any, prompts: MinimalPairs, circuits: dict[str, Circuit], draws: int, seed: int) -> None:
    data = [{"input_ids": prompts.clean, "attention_mask": prompts.mask.long()}]
    (means,) = view.observe(data, [HeadMeans()], progress=False)
    whole = answers_of(view, prompts).right.float()

    def lost(heads: Any) -> Tensor:
        return whole - answers_of(view, prompts, HeadMask(heads, "mean", means)).right.float() if heads else whole * 0

    ioi, colored = circuits[IOI].heads(), circuits[COLORED].heads()
    for name, heads in {SHARED: ioi & colored, WHOLE: ioi, ALONE: colored - ioi}.items():
        by_heads = lost(heads)
        drawn = sets.layer_matched(heads, view.num_heads, draws, seed=seed) if heads else ()
        by_random = torch.stack([lost(chosen) for chosen in drawn] or [by_heads * 0]).mean(dim=0)
        for label, loss in ((name, by_heads), (f"{MATCHED}, as many as {name}", by_random)):
            rows.add(LOST, {"heads": label}, float(loss.mean()))
        more = stats.difference(by_heads.numpy(), by_random.numpy())
        rows.add(LOST, {"heads": f"{name} - {MATCHED}"}, more.estimate)
        rows.add(LOST_LOW, {"heads": f"{name} - {MATCHED}"}, more.low)


def _repair(
    rows: Rows, view: Any, ioi: MinimalPairs, circuit: Circuit, prompts: MinimalPairs, draws: int, seed: int
) -> None:
    into_queries: PathEffects = circuit.stages[1][1]
    count = REPAIRED / sum(view.num_heads.values())
    wrong = torch.stack([prompts.positions[f"{name} colour"] for name in ("foil", "third")], dim=1)
    before = answers_of(view, prompts).right.float()

    def gained(heads: Any) -> Tensor:
        return answers_of(view, prompts, ForcePattern(heads, wrong)).right.float() - before

    chosen = into_queries.top(count)
    by_heads = gained(chosen)
    by_random = [gained(heads) for heads in sets.anywhere(REPAIRED, view.num_heads, draws, seed=seed, avoid=chosen)]
    best = max(by_random, key=lambda gain: float(gain.mean()))
    more = stats.difference(by_heads.numpy(), best.numpy())
    for name, gain in (("heads into the movers' queries", by_heads), (BEST_RANDOM, best)):
        rows.add(GAINED, {"heads": name}, float(gain.mean()))
    rows.add(GAINED, {"heads": "mean of random 4"}, fmean(float(gain.mean()) for gain in by_random))
    rows.add(GAINED, {"heads": f"these - {BEST_RANDOM}"}, more.estimate)
    rows.add(GAINED_LOW, {"heads": f"these - {BEST_RANDOM}"}, more.low)

    movers = [head for head in circuit.stages[0][1].top(SHARE) if head not in chosen]
    plain = attention_from(view, prompts, progress=False)
    with view.edits(ForcePattern(chosen, wrong)):
        forced = attention_from(view, prompts, progress=False)
    for name in ("colour", "foil colour", "third colour"):
        changes = [float(forced[name][layer][h] - plain[name][layer][h]) for layer, h in movers]
        rows.add(MOVED, {"to": name}, fmean(changes or [0.0]))


def claims(rows: Rows) -> list[Claim]:
    """What the paper's claims come to here."""

    def overlap(metric: str, one: str, two: str) -> float:
        return rows.mean(metric, {"heads kept at each stage": f"{SHARE:.0%}", "tasks": f"{one} and {two}"})

    statements: list[tuple[str, float, float]] = [
        (
            "overlap of indirect and coloured objects minus that of indirect objects and facts",
            overlap(OVERLAP, IOI, COLORED) - overlap(OVERLAP, IOI, FACT),
            0,
        ),
        (
            "overlap of indirect and coloured objects minus the 95th percentile of chance",
            overlap(OVERLAP, IOI, COLORED) - overlap(CHANCE_HIGH, IOI, COLORED),
            0,
        ),
        (
            "coloured objects lost with the shared heads, more than with layer-matched heads",
            rows.mean(LOST, {"heads": f"{SHARED} - {MATCHED}"}),
            ABLATION,
        ),
        (
            "the same: the lowest end of the seeds' 95% intervals",
            min(rows.values(LOST_LOW, {"heads": f"{SHARED} - {MATCHED}"})),
            0,
        ),
        (
            "coloured objects gained by the repair, more than by the best of 5 random choices",
            rows.mean(GAINED, {"heads": f"these - {BEST_RANDOM}"}),
            REPAIR,
        ),
    ]
    return [
        Claim(name=name, measured=measured, relation=">" if needed == 0 else ">=", needed=needed)
        for name, measured, needed in statements
    ]
