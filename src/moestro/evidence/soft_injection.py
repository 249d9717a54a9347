"""A small mixture-of-experts model (4 layers, 8 heads, 8 experts, 2 a token) is trained on rows of eleven examples of
one of 16 tasks, until it does a task from examples; then a task is put into its heads in their place. A question is a
pair of symbols (16 of them, 256 pairs). The four families of tasks say what is asked: the first symbol, the last, the
one after the first in the alphabet, or the one after the last; the four tasks of a family answer in words of their own,
so that one example tells the task. `quartet` itself could not serve: it has not been trained to follow examples.

- *Learned*, for two tasks of each family: the embedding from 50 prompts of 10 examples; theta in 100 steps of one
  question each, from 50 questions, chosen by 50 others; measured on 156 that are in neither. Three models, from
  different seeds.
- *Baselines* on the same questions: no example; 5 and 10 examples; all heads replaced (alpha = 1) and all half (0.5);
  the n heads replaced that lower the loss most one by one, with the n (1, 2, 4, 8, 16) that is best in validation; and
  a vector per layer added at the same place, trained alike, with 16 times as many numbers (rate 0.03).
- *Controls*: the learned theta with another task's embedding, measured on the theta's own task; beside the 8 heads with
  the largest alpha replaced, the 8 with the smallest, 8 random ones, and 8 of the same layers that are none of them.
- *Transfer*: one task's theta with another task's own embedding, on that task, within families and between.
- *Intervals* are over the 24 tasks of the three models (bootstrap, 95%).

A trial run trained on rows of seven examples, so that ten were more than the model had seen; they were made eleven.
To keep within minutes, the steps on theta were halved, and the model's training was cut from 250 steps of 64 rows to
200 of 40, before the first full run; the trial's model, better trained, had let injection reach what five examples
gave. In that run all tasks of a model shared one draw of 8 random heads, by rank; the two random controls of 3 draws
a task took its place, and the intervals behind the last claims were made rows. Claims and thresholds stayed as they
were.

Not tried here, for want of scale: natural language, where examples leave more to be wished for, and whole answers: an
answer is one token here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moestro.view.open as opening
from moestro.evidence.base import Claim, Evidence, Rows
from moestro.layers import after_step
from moestro.models.lm import MoELMConfig, MoELMForCausalLM
from moestro.sets import anywhere, layer_matched
from moestro.stats import Interval, bootstrap, difference
from moestro.steer.answers import Answered, frozen, pairs
from moestro.steer.soft_injection import (
    Selection,
    SoftInjection,
    Task,
    constant,
    few_shot,
    first_token_accuracy,
    head_transfer,
    rank_heads,
    replaced,
    select_heads,
    task_embedding,
)
from moestro.view.heads import HeadCall, HeadEdit
from moestro.view.observe import progress_bar

TITLE = "Soft Injection of Task Embeddings Outperforms Prompt-Based In-Context Learning"
ARXIV = "2507.20906"
CLAIM = (
    "Mean head outputs of few-shot prompts, mixed into the heads of a prompt without examples by one learned weight a "
    "head, do the task better than the examples themselves, at the length of the question alone."
)
SOURCES = (
    "steer/soft_injection.py",
    "steer/answers.py",
    "evidence/base.py",
    "models/lm.py",
)
QUICK = {"seeds": 1, "training_steps": 150, "steps": 20}
NOT_SHOWN = {
    "points that it gains on 5 examples, lower end": (
        "32 weights do not bring all of the task into the heads of a model trained for less than a minute, and how "
        "much they bring differs from model to model (see the spread). In a trial on one model trained for longer, on "
        "shorter rows, injection was level with five examples"
    ),
    "points that it gains on 10 examples, lower end: better than examples": (
        "as with 5 examples, which leave this model little to gain: its tasks are told by one"
    ),
    "points by which the 8 heads of largest alpha do better than 8 random ones, lower end": (
        "replacing a few heads whole is not what alpha was trained for: the 8 do far less than the weights of all"
    ),
}

# Thresholds, stated before the first run; in points of accuracy.
CAN_LEARN = 20.0  # what 5 examples must gain on none, or there is nothing to inject
OVER_NONE = 30.0
OVER_EXAMPLES = -3.0
OVER_HARD = -1.0
WRONG_EMBEDDING = 0.5  # at most this part of the accuracy
FAMILY = 10.0

SYMBOLS = 16
FAMILIES = {"first": (0, 0), "last": (1, 0), "after first": (0, 1), "after last": (1, 1)}
"""{family: (which symbol of the pair, how far to go on in the alphabet)}"""
LANGUAGES = 4
ARROW, END, START = (SYMBOLS * (1 + len(FAMILIES) * LANGUAGES) + i for i in range(3))
SHOWN = 11  # pairs in a row of training: up to ten examples
TRAIN, VALIDATION = 50, 50
COUNTS = (1, 2, 4, 8, 16)
TOP = 8
DRAWS = 3
"""Of each random control, for every task."""
SIZE: dict[str, Any] = dict(
    vocab_size=START + 1,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    moe_intermediate_size=64,
    num_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    router_losses={"load_balance": 0.01},
)

ACCURACY = "accuracy on questions, %"
GAIN = "accuracy of soft injection minus another way's, points"
MATRIX = "accuracy with one task's heads and another's embedding, on the other, mean over tasks, %"
HEADS = "accuracy with 8 heads replaced, %"
LEFT = "part of the accuracy that is left with a wrong task's embedding"
OWN = "accuracy with heads of the same family minus other families', points"
BETTER = "accuracy with the 8 heads of largest alpha replaced minus 8 random ones, points"
ABOUT = "about the runs"
NONE, FIVE, TEN, ONE, HALF = "no example", "5 examples", "10 examples", "all heads", "all heads half"
HARD, SOFT, VECTOR, WRONG = "best n heads", "soft injection", "trained vector", "wrong embedding"
LARGEST, SMALLEST, RANDOM = "largest alpha", "smallest alpha", "random"
MATCHED = "random, as many in each layer"


@dataclass(frozen=True)
class Rule:
    """One task: the pairs it is asked about, and the token that answers each."""

    name: str
    family: str
    answers: dict[tuple[int, int], int]

    def pairs(self, questions: Sequence[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
        """(question, answer and end) as token ids."""
        return [([*q, ARROW], [self.answers[q], END]) for q in questions]

    def zero_shot(self, questions: Sequence[tuple[int, int]]) -> tuple[list[list[int]], list[list[int]]]:
        """(prompts, answers)"""
        return [[START, *q, ARROW] for q in questions], [[self.answers[q]] for q in questions]


def rules() -> list[Rule]:
    every = [(a, b) for a in range(SYMBOLS) for b in range(SYMBOLS)]
    found: list[Rule] = []
    for family, (which, step) in FAMILIES.items():
        for language in range(LANGUAGES):
            words = SYMBOLS * (1 + len(found))
            answers = {q: words + (q[which] + step) % SYMBOLS for q in every}
            found.append(Rule(f"{family} {language + 1}", family, answers))
    return found


def run(*, seeds: int = 3, training_steps: int = 200, steps: int = 100, progress: bool = True) -> Evidence:
    """Train, learn the injections and measure, seed by seed.

    Raises ValueError where a model does not learn from examples.
    """
    tasks = rules()[::2]
    rows, found = Rows(), dict[str, list[float]]()
    within: list[float] = []
    between: list[float] = []
    with progress_bar(progress) as bar:
        bars = bar.add_task("tasks", total=seeds * len(tasks))
        for seed in range(seeds):
            view = opening.open(trained(seed, training_steps))
            order = torch.randperm(SYMBOLS**2, generator=torch.Generator().manual_seed(seed)).tolist()
            questions = [divmod(i, SYMBOLS) for i in order]
            learned, tests, embeddings = {}, {}, {}
            for rule in tasks:
                embeddings[rule.name] = _embedding(view, rule, questions, seed)
                learned[rule.name] = _learn(view, rule, embeddings[rule.name], questions, steps, seed)
                tests[rule.name] = (embeddings[rule.name], *rule.zero_shot(questions[TRAIN + VALIDATION :]))
                _measure(found, view, rule, questions, learned[rule.name], embeddings[rule.name], steps, seed)
                bar.advance(bars)
            for rule, before in zip(tasks, [tasks[-1], *tasks[:-1]]):
                injection = learned[rule.name].injection(embeddings[before.name])
                right = first_token_accuracy(view, *tests[rule.name][1:], injection)
                found.setdefault(WRONG, []).append(_percent(right))
            _transfer(rows, view, tasks, learned, tests, within, between)
            gained = _means(found, FIVE, seed, len(tasks)) - _means(found, NONE, seed, len(tasks))
            if gained <= CAN_LEARN:
                raise ValueError(
                    f"5 examples gain {gained:.1f} points on none for seed {seed}: the model has not learned to follow "
                    f"examples (needed: {CAN_LEARN:g}); train it for more than {training_steps} steps"
                )
    _add(rows, found, seeds, len(tasks))
    _add_interval(rows, OWN, {}, difference(within, between))
    return Evidence(rows=list(rows), claims=claims(rows))


def trained(seed: int, steps: int, batch_rows: int = 40) -> MoELMForCausalLM:
    """A model trained on rows of examples; the answers alone are its targets."""
    torch.manual_seed(seed)
    model = MoELMForCausalLM(MoELMConfig(**SIZE))
    every = rules()
    which = torch.tensor([FAMILIES[r.family][0] for r in every])
    table = torch.tensor([[r.answers[s, s] for s in range(SYMBOLS)] for r in every])
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min((step + 1) / 40, 1 - 0.9 * step / steps))
    model.train()
    for step in range(steps):
        task = torch.randint(len(every), (batch_rows,), generator=generator)
        pairs = torch.randint(SYMBOLS, (batch_rows, SHOWN, 2), generator=generator)
        asked = pairs.gather(2, which[task][:, None, None].expand(-1, SHOWN, 1)).squeeze(2)
        answers = table[task].gather(1, asked)
        arrow, end = torch.full_like(answers, ARROW), torch.full_like(answers, END)
        ids = torch.cat([pairs, torch.stack([arrow, answers, end], dim=2)], dim=2).flatten(1)
        ids = F.pad(ids, (1, 0), value=START)
        labels = torch.full_like(ids, -100)
        labels[:, 4::5] = answers
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        rate.step()
        after_step(model, (step + 1) / steps)
    return model.eval()


def _embedding(view: Any, rule: Rule, questions: list[tuple[int, int]], seed: int) -> dict[int, Tensor]:
    prompts = few_shot(rule.pairs(questions[:TRAIN]), lead=[START], seed=seed)
    return task_embedding(view, prompts, progress=False)


def _task(rule: Rule, embedding: dict[int, Tensor], questions: list[tuple[int, int]]) -> Task:
    prompts, answers = rule.zero_shot(questions[: TRAIN + VALIDATION])
    return Task(embedding, prompts[:TRAIN], answers[:TRAIN], prompts[TRAIN:], answers[TRAIN:])


def _learn(
    view: Any, rule: Rule, embedding: dict[int, Tensor], questions: list[tuple[int, int]], steps: int, seed: int
) -> Selection:
    return select_heads(view, _task(rule, embedding, questions), steps=steps, seed=seed, progress=False)


def _measure(
    found: dict[str, list[float]],
    view: Any,
    rule: Rule,
    questions: list[tuple[int, int]],
    selection: Selection,
    embedding: dict[int, Tensor],
    steps: int,
    seed: int,
) -> None:
    """One task by every way."""
    task = _task(rule, embedding, questions)
    held = questions[TRAIN + VALIDATION :]
    prompts, answers = rule.zero_shot(held)
    soft = selection.injection(embedding)
    hard = _best_heads(view, task)
    ways: dict[str, SoftInjection | None] = {
        NONE: None,
        ONE: constant(embedding, 1.0),
        HALF: constant(embedding, 0.5),
        HARD: replaced(embedding, hard[0]),
        SOFT: soft,
        LARGEST: replaced(embedding, soft.top_heads(TOP)),
        SMALLEST: replaced(embedding, soft.top_heads(len(hard[1]))[-TOP:]),
    }
    for way, injection in ways.items():
        found.setdefault(way, []).append(_percent(first_token_accuracy(view, prompts, answers, injection)))
    sizes = {layer: len(t) for layer, t in embedding.items()}
    largest, nth = soft.top_heads(TOP), len(found[SOFT])
    controls = {
        RANDOM: anywhere(TOP, sizes, DRAWS, seed=nth),
        MATCHED: layer_matched(largest, sizes, DRAWS, seed=nth),
    }
    for way, draws in controls.items():
        rights = [first_token_accuracy(view, prompts, answers, replaced(embedding, heads)) for heads in draws]
        found.setdefault(way, []).append(_percent(torch.stack(rights)))
    for way, shots in ((FIVE, 5), (TEN, 10)):
        shown = [_examples(rule, questions[:TRAIN], q, shots, seed * 1000 + i) for i, q in enumerate(held)]
        found.setdefault(way, []).append(_percent(first_token_accuracy(view, shown, answers)))
    found.setdefault(VECTOR, []).append(_percent(_vector(view, task, prompts, answers, steps, seed)))


def _examples(rule: Rule, shown: list[tuple[int, int]], question: tuple[int, int], shots: int, seed: int) -> list[int]:
    chosen = torch.randperm(len(shown), generator=torch.Generator().manual_seed(seed))[:shots].tolist()
    ids = [i for q, a in rule.pairs([shown[c] for c in chosen]) for i in (*q, *a)]
    return [START, *ids, *question, ARROW]


def _best_heads(view: Any, task: Task) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(the n best heads, with the n that is best in validation; all heads, by what each does alone)"""
    ranked = [head for head, _ in rank_heads(view, task.embedding, task.prompts, task.answers)]
    tried = {
        n: float(
            first_token_accuracy(
                view, task.validation_prompts, task.validation_answers, replaced(task.embedding, ranked[:n])
            ).mean()
        )
        for n in COUNTS
    }
    return ranked[: max(tried, key=lambda n: tried[n])], ranked


@dataclass(eq=False)
class Added(HeadEdit):
    """A vector added to every head's output at the last prompt token: {layer: [A, D]}."""

    vectors: dict[int, Tensor]
    lengths: Tensor

    def z(self, call: HeadCall, z: Tensor) -> Tensor:
        here = call.places(self.lengths[:, None] - 1).any(dim=2)[:, :, None, None]
        return torch.where(here, z + self.vectors[call.layer.index], z)


def _vector(view: Any, task: Task, prompts: list[list[int]], answers: list[list[int]], steps: int, seed: int) -> Tensor:
    """First-token accuracy with vectors trained on the questions that theta is trained on, chosen in the same way."""
    vectors = {layer: torch.zeros_like(t, requires_grad=True) for layer, t in task.embedding.items()}
    adam = torch.optim.Adam(vectors.values(), lr=0.03)
    generator = torch.Generator().manual_seed(seed)
    best, least = vectors, float("inf")
    with frozen(view.model):
        single = [Answered(view, [p], [a]) for p, a in zip(*pairs(view, task.prompts, task.answers))]
        held = Answered(view, *pairs(view, task.validation_prompts, task.validation_answers))
        for step in range(steps + 1):
            if step % 50 == 0 or step == steps:
                with torch.no_grad():
                    loss = float(held.losses(Added(vectors, held.lengths))[0].mean())
                if loss < least:
                    best, least = {layer: v.detach().clone() for layer, v in vectors.items()}, loss
            one = single[int(torch.randint(len(single), (1,), generator=generator))]
            adam.zero_grad()
            one.losses(Added(vectors, one.lengths))[0].sum().backward()
            adam.step()
        with torch.no_grad():
            tried = Answered(view, prompts, answers)
            return tried.losses(Added(best, tried.lengths))[1].float()


def _transfer(
    rows: Rows,
    view: Any,
    tasks: list[Rule],
    learned: dict[str, Selection],
    tests: dict[str, tuple[Any, Any, Any]],
    within: list[float],
    between: list[float],
) -> None:
    """The matrix by families; the diagonal, a task's own theta, is left out."""
    matrix = head_transfer(view, learned, tests)
    cells: dict[tuple[str, str], list[float]] = {}
    for source in tasks:
        scored = [(target, _percent(matrix[source.name][target.name])) for target in tasks if target is not source]
        for target, accuracy in scored:
            cells.setdefault((source.family, target.family), []).append(accuracy)
        own = [a for target, a in scored if target.family == source.family]
        others = [a for target, a in scored if target.family != source.family]
        within.append(fmean(own))
        between.append(fmean(others))
    for (source_family, target_family), values in cells.items():
        rows.add(MATRIX, {"heads of": source_family, "task": target_family}, fmean(values))


def _percent(right: Tensor) -> float:
    return 100 * float(right.mean())


def _means(found: dict[str, list[float]], way: str, seed: int, tasks: int) -> float:
    return fmean(found[way][seed * tasks : (seed + 1) * tasks])


def _add(rows: Rows, found: dict[str, list[float]], seeds: int, tasks: int) -> None:
    ways = (NONE, FIVE, TEN, ONE, HALF, HARD, SOFT, VECTOR, WRONG)
    for way in ways:
        rows.add(ACCURACY, {"way": way}, *(_means(found, way, seed, tasks) for seed in range(seeds)))
    for way in (LARGEST, SMALLEST, RANDOM, MATCHED):
        rows.add(HEADS, {"heads": way}, *(_means(found, way, seed, tasks) for seed in range(seeds)))
    for way in (*ways, LARGEST, SMALLEST, RANDOM, MATCHED):
        if way != SOFT:
            _add_interval(rows, GAIN, {"way": way}, difference(found[SOFT], found[way]))
    _add_interval(rows, BETTER, {}, difference(found[LARGEST], found[RANDOM]))
    _add_interval(rows, LEFT, {}, bootstrap(found[WRONG], found[SOFT], statistic=_ratio_of_means))
    heads = SIZE["num_hidden_layers"] * SIZE["num_attention_heads"]
    rows.add(ABOUT, {"": "tokens of a prompt, injected"}, 4)
    rows.add(ABOUT, {"": "tokens of a prompt with 10 examples"}, 54)
    rows.add(ABOUT, {"": "numbers trained by soft injection"}, heads)
    rows.add(ABOUT, {"": "numbers trained as a vector"}, heads * SIZE["head_dim"])


def _add_interval(rows: Rows, metric: str, setting: dict[str, str], found: Interval) -> None:
    for name, value in (("estimate", found.estimate), ("low", found.low), ("high", found.high)):
        rows.add(metric, setting | {"": name}, value)


def claims(rows: Rows) -> list[Claim]:
    """What the paper's claims come to here."""

    def low(way: str) -> float:
        return rows.mean(GAIN, {"way": way, "": "low"})

    return [
        Claim(
            name="points that soft injection gains on no example, lower end of the interval",
            measured=low(NONE),
            relation=">=",
            needed=OVER_NONE,
        ),
        Claim(
            name="points that it gains on 5 examples, lower end",
            measured=low(FIVE),
            relation=">=",
            needed=OVER_EXAMPLES,
        ),
        Claim(
            name="points that it gains on 10 examples, lower end: better than examples",
            measured=low(TEN),
            relation=">",
            needed=0,
        ),
        Claim(
            name="points that it gains on the best n heads replaced, lower end",
            measured=low(HARD),
            relation=">=",
            needed=OVER_HARD,
        ),
        Claim(
            name="points that it gains on the better of all heads and all heads half, lower end",
            measured=min(low(ONE), low(HALF)),
            relation=">",
            needed=0,
        ),
        Claim(
            name="points that it gains on a trained vector of 16 times its size, lower end",
            measured=low(VECTOR),
            relation=">=",
            needed=OVER_HARD,
        ),
        Claim(
            name="part of the accuracy that is left with a wrong task's embedding, upper end",
            measured=rows.mean(LEFT, {"": "high"}),
            relation="<",
            needed=WRONG_EMBEDDING,
        ),
        Claim(
            name="points by which heads serve their own family better than others, lower end",
            measured=rows.mean(OWN, {"": "low"}),
            relation=">",
            needed=FAMILY,
        ),
        Claim(
            name="points by which the 8 heads of largest alpha do better than 8 random ones, lower end",
            measured=rows.mean(BETTER, {"": "low"}),
            relation=">",
            needed=0,
        ),
    ]


def _ratio_of_means(part: Any, whole: Any, axis: int) -> Any:
    return part.mean(axis=axis) / whole.mean(axis=axis)
