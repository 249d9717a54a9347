"""A task learned once from examples and put into the attention heads, in the place of examples in every prompt.

    embedding = task_embedding(view, few_shot_prompts)                    t[l, h]: mean head output at the last token
    selected = select_heads(view, Task(embedding, prompts, answers, validation_prompts, validation_answers))
    ids = generate(view, selected.injection(embedding), questions, max_new_tokens=20)

At the last token of a prompt without examples, in all layers at once and when the prompt is read alone,

    z'[l, h] = (1 - alpha[l, h]) z[l, h] + alpha[l, h] t[l, h]            alpha = sigmoid(theta)

and theta, one number a head, is trained on the loss of the answer's first token. Later tokens see the injection through
the keys and values that follow from it. z is what `view.heads` calls so: the input of the output projection (before the
output gate of a family that has one).

"Soft Injection of Task Embeddings Outperforms Prompt-Based In-Context Learning" (arXiv:2507.20906).
Shapes: L layers, A query heads, D head width, B rows, T positions.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.steer.answers import BATCH, Answered, Prompt, by_length, frozen, judge, padded, pairs, token_ids
from moestro.view.heads import At, HeadCall, HeadEdit, HeadEvent, HeadId, HeadLayer
from moestro.view.observe import progress_bar

RATE = 0.2
"""Of Adam, on theta: heads are to be chosen, not shaded."""
STEPS = 400
EVERY = 50
"""Steps from one look at the validation loss to the next; the theta with the least is kept."""
SHOTS = 10
PROMPTS = 50

Embedding = Mapping[int, Float[Tensor, "_ _"]]
"""{layer: t [A, D]}"""
Alpha = Mapping[int, Float[Tensor, " _"]]
"""{layer: alpha [A], from 0 to 1}"""


@dataclass(eq=False)
class SoftInjection(HeadEdit):
    """Mix a task embedding into the heads at the last prompt token, while the prompt is read.

    Where nothing is cached every step reads the prompt anew: say where it ends with `ending_at`, or use `generate`.
    """

    embedding: Embedding
    alpha: Alpha
    at: At = "last"

    def ending_at(self, lengths: Int[Tensor, " b"]) -> SoftInjection:
        """The same for rows whose prompts have so many tokens, padding not counted."""
        return replace(self, at=lengths[:, None] - 1)

    def layers(self) -> Collection[int]:
        return self.alpha.keys()

    def check(self, layer: HeadLayer) -> None:
        alpha, embedding = self.alpha[layer.index], self.embedding.get(layer.index)
        shape = None if embedding is None else tuple(embedding.shape)
        if (tuple(alpha.shape), shape) != ((layer.num_heads,), (layer.num_heads, layer.head_dim)):
            raise ValueError(
                f"an injection with alpha of shape {tuple(alpha.shape)} and an embedding of {shape} in layer "
                f"{layer.index}, which has {layer.num_heads} heads of width {layer.head_dim}: it is of another model"
            )
        if not bool(((alpha >= 0) & (alpha <= 1)).all()):
            raise ValueError(
                f"alpha from {float(alpha.min()):.3g} to {float(alpha.max()):.3g}; it lies between 0 and 1"
            )

    def z(self, call: HeadCall, z: Tensor) -> Tensor:
        here = call.places(self.at).any(dim=2).to(z.device)[:, :, None, None]
        alpha = self.alpha[call.layer.index].to(z)[:, None]
        mixed = z + alpha * (self.embedding[call.layer.index].to(z) - z)
        return torch.where(here, mixed, z)

    def top_heads(self, n: int) -> list[HeadId]:
        """The n heads with the largest alpha, the largest first."""
        return _ranked(self.alpha)[:n]


def constant(embedding: Embedding, alpha: float) -> SoftInjection:
    """The baseline: one alpha for all heads; 1 replaces them all by the embedding."""
    return SoftInjection(embedding, {layer: torch.full((len(t),), float(alpha)) for layer, t in embedding.items()})


def replaced(embedding: Embedding, heads: Iterable[HeadId]) -> SoftInjection:
    """The hard choice: these heads are replaced by the embedding, the others left.

    Raises ValueError for a head that the embedding does not have.
    """
    alpha = {layer: torch.zeros(len(t)) for layer, t in embedding.items()}
    for layer, head in heads:
        if layer not in alpha or not 0 <= head < len(alpha[layer]):
            raise ValueError(f"the embedding has no head {head} in layer {layer}")
        alpha[layer][head] = 1.0
    return SoftInjection(embedding, alpha)


@dataclass(frozen=True, eq=False)
class Task:
    """Questions without examples and their answers, to train on and to choose by, and the task's embedding."""

    embedding: Embedding
    prompts: Sequence[Prompt]
    answers: Sequence[Prompt]
    validation_prompts: Sequence[Prompt]
    validation_answers: Sequence[Prompt]


@dataclass(frozen=True, eq=False)
class Selection:
    """Which heads to inject into, and how it was found."""

    alpha: dict[int, Float[Tensor, " _"]]
    step: int
    """The step whose theta it is."""
    losses: dict[int, float]
    """{step: validation loss}"""

    def injection(self, embedding: Embedding) -> SoftInjection:
        return SoftInjection(embedding, self.alpha)


class LastTokenHeads:
    """Observer: {layer: mean over rows of z at the row's last token, [A, D]}. A row is a whole prompt."""

    needs = frozenset({"heads"})

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._rows: dict[int, int] = {}

    def update_heads(self, event: HeadEvent) -> None:
        last = event.call.last
        rows = (last >= 0).nonzero().squeeze(1)
        z = event.z_grid[rows.to(event.z_grid.device), last[rows].to(event.z_grid.device)]
        self._sums[event.layer] = self._sums.get(event.layer, 0) + z.double().sum(dim=0).cpu()
        self._rows[event.layer] = self._rows.get(event.layer, 0) + len(rows)

    def merge(self, other: Self) -> None:
        for layer, total in other._sums.items():
            self._sums[layer] = self._sums.get(layer, 0) + total
            self._rows[layer] = self._rows.get(layer, 0) + other._rows[layer]

    def result(self) -> dict[int, Float[Tensor, "_ _"]]:
        return {layer: (total / self._rows[layer]).float() for layer, total in sorted(self._sums.items())}


def few_shot(
    shown: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    shots: int = SHOTS,
    count: int = PROMPTS,
    lead: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """`count` prompts, each of `shots` random examples and one more question, from (question, answer) token ids.

    Answers end as an example ends ("\\n\\n", say); `lead` opens every prompt. Raises ValueError for too few pairs.
    """
    if not 0 <= shots < len(shown):
        raise ValueError(f"shots={shots} and a question from {len(shown)} pairs; give at least {shots + 1}")
    rng = random.Random(seed)
    prompts = []
    for _ in range(count):
        *examples, (question, _) = rng.sample(shown, shots + 1)
        prompts.append([*lead, *(i for q, a in examples for i in (*q, *a)), *question])
    return prompts


def task_embedding(
    view: Any, prompts: Sequence[Prompt], *, batch_size: int = BATCH, progress: bool = True
) -> dict[int, Float[Tensor, "_ _"]]:
    """Mean output of every head at the last token of prompts that show the task."""
    ids = token_ids(view, prompts)
    batches = []
    for rows in by_length(ids, batch_size):
        batch, mask = padded([ids[r] for r in rows], "right")
        batches.append({"input_ids": batch, "attention_mask": mask})
    return view.observe(batches, [LastTokenHeads()], progress=progress, description="task embedding")[0]


def select_heads(
    view: Any,
    *tasks: Task,
    rate: float = RATE,
    steps: int = STEPS,
    every: int = EVERY,
    seed: int = 0,
    progress: bool = True,
) -> Selection:
    """Train theta, from 0, on one pair at a time (of a random task, where there are several, with its own embedding).

    Raises ValueError, before anything is trained, for no task, pairs that do not match, or embeddings of another model.
    """
    if not tasks or steps < 1 or every < 1:
        raise ValueError(f"{len(tasks)} tasks, steps={steps}, every={every}: all must be 1 or more")
    first = tasks[0].embedding
    for task in tasks:
        if {n: t.shape for n, t in task.embedding.items()} != {n: t.shape for n, t in first.items()}:
            raise ValueError("the tasks' embeddings differ in shape: they are of different models")
    trained = [_first_tokens(view, t.prompts, t.answers) for t in tasks]
    validation = [_first_tokens(view, t.validation_prompts, t.validation_answers) for t in tasks]
    theta = {layer: torch.zeros(len(t), requires_grad=True) for layer, t in first.items()}
    rng = random.Random(seed)
    losses: dict[int, float] = {}
    best: dict[int, Tensor] = {}
    with view.edits(constant(first, 0.0)):  # refuses another model's
        pass
    with frozen(view.model), progress_bar(progress) as bar:
        single = [[Answered(view, [p], [a]) for p, a in zip(*pair, strict=True)] for pair in trained]
        held = [Answered(view, *pair) for pair in validation]
        adam = torch.optim.Adam(theta.values(), lr=rate)
        shown = bar.add_task("heads", total=steps)
        for step in range(steps + 1):
            if step % every == 0 or step == steps:
                alpha = {layer: t.detach().sigmoid() for layer, t in theta.items()}
                with torch.no_grad():
                    found = [_loss(tried, SoftInjection(t.embedding, alpha)) for tried, t in zip(held, tasks)]
                losses[step] = float(torch.cat(found).mean())
                if losses[step] <= min(losses.values()):
                    best, chosen = alpha, step
            if step < steps:
                number = rng.randrange(len(tasks))
                alpha = {layer: t.sigmoid() for layer, t in theta.items()}
                loss = _loss(rng.choice(single[number]), SoftInjection(tasks[number].embedding, alpha)).sum()
                adam.zero_grad()
                loss.backward()
                adam.step()
                bar.advance(shown)
    return Selection(best, chosen, losses)


def rank_heads(
    view: Any, embedding: Embedding, prompts: Sequence[Prompt], answers: Sequence[Prompt]
) -> list[tuple[HeadId, float]]:
    """Every head and by how much the loss falls when it alone is replaced by the embedding, the largest fall first."""
    with torch.no_grad():
        tried = Answered(view, *_first_tokens(view, prompts, answers))
        plain = float(tried.losses()[0].mean())
        heads = [(layer, head) for layer, t in sorted(embedding.items()) for head in range(len(t))]
        falls = [(head, plain - float(_loss(tried, replaced(embedding, [head])).mean())) for head in heads]
    return sorted(falls, key=lambda found: -found[1])


def first_token_accuracy(
    view: Any,
    prompts: Sequence[Prompt],
    answers: Sequence[Prompt],
    injection: SoftInjection | None = None,
    *,
    batch_size: int = BATCH,
) -> Float[Tensor, " s"]:
    """1 for every question whose answer the model begins rightly, 0 for others."""
    asked, known = _first_tokens(view, prompts, answers)
    lengths = torch.tensor([len(p) for p in asked])
    edit = None if injection is None else lambda rows: injection.ending_at(lengths[rows])
    return judge(view, asked, known, edit, batch_size=batch_size, progress=False).right.float()


def head_transfer(
    view: Any,
    selections: Mapping[str, Selection],
    tests: Mapping[str, tuple[Embedding, Sequence[Prompt], Sequence[Prompt]]],
) -> dict[str, dict[str, Float[Tensor, " s"]]]:
    """{heads of: {task: first-token accuracy by question}}: one task's heads with each task's own embedding."""
    return {
        name: {
            task: first_token_accuracy(view, prompts, answers, selection.injection(embedding))
            for task, (embedding, prompts, answers) in tests.items()
        }
        for name, selection in selections.items()
    }


@torch.no_grad()
def generate(view: Any, injection: SoftInjection, prompts: Sequence[Prompt], **options: Any) -> Int[Tensor, "b t"]:
    """The prompts' continuations (`options` go to the model's `generate`), without the prompts.

    Beams and several sampled answers are injected alike, with a cache and without.
    """
    asked = token_ids(view, prompts)
    ids, mask = (t.to(view.device) for t in padded(asked, "left"))
    with view.edits(injection.ending_at(torch.tensor([len(p) for p in asked]))):
        out = view.model.generate(input_ids=ids, attention_mask=mask, **{"do_sample": False, **options})
    return out[:, ids.shape[1] :]


def _loss(tried: Answered, injection: SoftInjection) -> Tensor:
    return tried.losses(injection.ending_at(tried.lengths))[0]


def _first_tokens(
    view: Any, prompts: Sequence[Prompt], answers: Sequence[Prompt]
) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, the first token of each answer). Warns where this token does not tell the answers apart."""
    asked, known = pairs(view, prompts, answers)
    answers_, firsts = {tuple(a) for a in known}, {a[0] for a in known}
    if 2 * len(firsts) < len(answers_):
        warnings.warn(
            f"{len(answers_)} different answers begin with {len(firsts)} different tokens: the first token alone says "
            "little of them; where it is a space, move it to the end of the prompts",
            stacklevel=3,
        )
    return asked, [a[:1] for a in known]


def _ranked(alpha: Alpha) -> list[HeadId]:
    heads = [(float(a), (layer, head)) for layer, row in alpha.items() for head, a in enumerate(row)]
    return [head for _, head in sorted(heads, key=lambda found: (-found[0], found[1]))]
