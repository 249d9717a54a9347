"""A small BERT distilled into students of four experts under several gates: the part of `comet` about language.

Shapes: N excerpts, T tokens, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from moestro.build.in_place import InnerMoE
from moestro.build.moebert import cut_by_importance, neuron_importance, split_by_importance
from moestro.bundled import bundled_path
from moestro.data import embedded
from moestro.data.embedded_sample import Split
from moestro.evidence.base import Claim, Rows, ratio
from moestro.layers import after_step
from moestro.layers.routers.comet import CometRouter
from moestro.routing import dense_weights
from moestro.train.consistency import symmetric_kl
from moestro.train.distillation import distillation_step
from moestro.view.layers import load_tokenizer

# Thresholds, stated before the first run.
LOST_TO_TEACHER = 0.02  # accuracy
ALONE = 0.9  # share of tokens with one expert, before rounding
LOST_BY_ROUNDING = 0.005  # accuracy

DOMAINS = ("code", "docs", "science", "ui-en", "ui-es", "ui-pt", "ui-ru", "ui-uk")
LENGTHS = (8, 16)  # tokens of an excerpt, with the one that opens it
HELDOUT = 300  # excerpts of a domain
BERT: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# As MoEBERT cuts BERT: a quarter of the width each, two thirds of that shared.
EXPERTS, EXPERT_SIZE, SHARED = 4, 96, 64
BATCH, RATE, WARMUP = 32, 1e-3, 0.1
IMPORTANCE_BATCHES = 32
DISTILLATION = 1.0  # weight of the distillation loss, as released for COMET
SEARCH = 1 / 3  # of the steps

# Each the best of four on a further seed and a quarter of the calibration documents, before any recorded run: gamma 0.1
# or 1 with lambda 0.1 or 1; a balance loss of 0.001 to 1.
TREE = {"kind": "comet", "gamma": 1.0, "entropy_coef": 1.0, "node_bias": False}
BALANCE = 1.0
COMET, SEARCHED, TOP_1, HASH, DENSE = "COMET", "COMET, local search", "top-1 softmax", "hash", "dense, as narrow"
PREDICTIONS_ONLY, TEACHER = "COMET, no layer-wise loss", "teacher"
TRAININGS = 7
"""From every seed: the teacher and its students."""

ACCURACY = "accuracy on held-out excerpts"
LOSS = "held-out loss, nats"
DIVERGENCE = "held-out divergence from the teacher's predictions, nats"
GAIN = "accuracy less that of another, same seed; nodes rounded"
SINGLE = "share of tokens with exactly one expert"
ACTIVE_EXPERTS = "experts a token of an excerpt uses on average"
USED_EXPERTS = "experts that serve at least 1% of the tokens, mean of the layers"
AS_TRAINED, ROUNDED = "as trained", "rounded"


@dataclass(frozen=True)
class Excerpts:
    ids: Tensor  # [N, T]
    mask: Tensor  # [N, T]
    domain: Tensor  # [N]

    def __getitem__(self, chosen: Any) -> dict[str, Tensor]:
        """Some excerpts, by the names of a model's arguments."""
        return {"input_ids": self.ids[chosen], "attention_mask": self.mask[chosen], "labels": self.domain[chosen]}


@cache
def tokenizer() -> Any:
    path = bundled_path("quartet")
    assert path is not None, "quartet is part of the package"
    return load_tokenizer(path)


@cache
def excerpts(split: Split, most: int | None = None) -> Excerpts:
    """Stretches of every domain's documents that do not overlap, cut to lengths drawn once; `most` of a domain."""
    shortest, longest = LENGTHS
    draw = torch.Generator().manual_seed(0)
    rows, domains = [], []
    for number, name in enumerate(DOMAINS):
        found = []
        for document in embedded([name], split):
            opening, *ids = tokenizer()(document.text, verbose=False)["input_ids"]
            found += [[opening, *ids[i : i + longest - 1]] for i in range(0, len(ids) - longest + 2, longest - 1)]
        kept = found if most is None else found[:: max(1, len(found) // most)][:most]
        rows += kept
        domains += [number] * len(kept)
    ids = torch.tensor(rows)
    lengths = torch.randint(shortest, longest + 1, (len(ids), 1), generator=draw)
    mask = (torch.arange(longest) < lengths).long()
    return Excerpts(ids * mask, mask, torch.tensor(domains))


def batches(data: Excerpts, seed: int) -> Iterator[dict[str, Tensor]]:
    """Without end, each pass in a new order."""
    order = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(data.ids), generator=order).split(BATCH):
            yield data[chosen]


def fit(model: Any, data: Excerpts, seed: int, steps: int, loss: Callable[[dict[str, Tensor]], Tensor]) -> None:
    """Adam with a linear warm-up and decay; routers are told of every step."""
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    warmup = WARMUP * steps
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    model.train()
    for step, batch in enumerate(islice(batches(data, seed), steps)):
        model.base_model.progress = step / steps
        value = loss(batch)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        shape.step()
        after_step(model, (step + 1) / steps)
    model.eval()


def train_teacher(data: Excerpts, seed: int, steps: int) -> Any:
    torch.manual_seed(seed)
    options: dict[str, Any] = BERT | {
        "vocab_size": tokenizer().vocab_size,
        "max_position_embeddings": LENGTHS[1],
        "num_labels": len(DOMAINS),
        "pad_token_id": tokenizer().pad_token_id,
    }
    teacher: Any = BertForSequenceClassification(BertConfig(**options))
    fit(teacher, data, seed, steps, lambda batch: teacher(**batch).loss)
    return teacher


def students(teacher: Any, importance: list[Tensor], steps: int) -> dict[str, Callable[[], Any]]:
    """How each student begins."""

    def split(router: Any, **options: Any) -> Callable[[], Any]:
        cut = {"expert_size": EXPERT_SIZE, "shared": SHARED, "router": router, **options}
        return lambda: split_by_importance(teacher, importance, EXPERTS, **cut)

    search = {"kind": "permuted", "router": TREE, "steps": max(1, round(SEARCH * steps))}
    return {
        COMET: split(TREE),
        SEARCHED: split(search),
        TOP_1: split("switch", losses={"load_balance": BALANCE}),
        HASH: split("hash"),
        DENSE: lambda: cut_by_importance(teacher, importance, EXPERT_SIZE),
        PREDICTIONS_ONLY: split(TREE),
    }


def measure_students(
    rows: Rows, seed: int, teacher_steps: int, steps: int, on_done: Callable[[], Any] = lambda: None
) -> None:
    """Train a teacher, distil every student from it and measure them all."""
    train, heldout = excerpts("calibration"), excerpts("heldout", HELDOUT)
    teacher = train_teacher(train, seed, teacher_steps)
    on_done()
    chosen = islice(batches(train, seed), IMPORTANCE_BATCHES)
    importance = neuron_importance(teacher, chosen, lambda m, batch: m(**batch).loss * len(batch["labels"]))
    taught = predict(teacher, heldout)
    found = {TEACHER: _measure(rows, {"model": TEACHER, "nodes": AS_TRAINED}, taught, taught, heldout)}
    for name, begin in students(teacher, importance, steps).items():
        torch.manual_seed(seed)
        student = begin()
        hidden_weight = 0.0 if name == PREDICTIONS_ONLY else 1.0
        teach = partial(distillation_step, student, teacher, weight=DISTILLATION, hidden_weight=hidden_weight)
        fit(student, train, seed, steps, lambda batch, teach=teach: teach(batch)["loss"])  # type: ignore[misc]
        trees = [m for m in student.modules() if isinstance(m, CometRouter)]
        for nodes in (AS_TRAINED, ROUNDED) if trees else (AS_TRAINED,):
            if nodes == ROUNDED:
                for tree in trees:
                    tree.harden()
            setting, gates = {"model": name, "nodes": nodes}, dict[int, list[Tensor]]()
            found[name] = _measure(rows, setting, predict(student, heldout, gates), taught, heldout)
            if name != DENSE:
                _measure_gates(rows, setting, gates)
        on_done()
    for name, other in ((COMET, HASH), (COMET, TOP_1), (COMET, DENSE), (COMET, SEARCHED), (SEARCHED, HASH)):
        rows.add(GAIN, {"model": name, "less": other}, found[name] - found[other])


@torch.no_grad()
def predict(model: Any, data: Excerpts, gates: dict[int, list[Tensor]] | None = None) -> Tensor:
    """Logits [N, C]; `gates` gets each layer's gate weights [M, E] of the tokens that are no padding, in parts."""

    def keep(layer: int, router: Any, args: Any, out: Any) -> None:
        gates.setdefault(layer, []).append(dense_weights(out, EXPERTS)[args[1].real])  # type: ignore[union-attr]

    moes = [m for m in model.modules() if isinstance(m, InnerMoE)] if gates is not None else []
    hooks = [moe.router.register_forward_hook(partial(keep, moe.layer)) for moe in moes]
    logits = torch.cat([model(**data[chosen]).logits for chosen in torch.arange(len(data.ids)).split(16 * BATCH)])
    for hook in hooks:
        hook.remove()
    return logits


def _measure(rows: Rows, setting: dict[str, str], logits: Tensor, taught: Tensor, data: Excerpts) -> float:
    """The accuracy, which is also a row."""
    accuracy = float((logits.argmax(dim=-1) == data.domain).float().mean())
    rows.add(ACCURACY, setting, accuracy)
    rows.add(LOSS, setting, float(F.cross_entropy(logits, data.domain)))
    if logits is not taught:
        rows.add(DIVERGENCE, setting, float(symmetric_kl(logits, taught, reduction="mean")))
    return accuracy


def _measure_gates(rows: Rows, setting: dict[str, str], gates: dict[int, list[Tensor]]) -> None:
    active = torch.stack([torch.cat(parts) > 0 for parts in gates.values()]).float()  # [L, M, E]
    count = active.sum(dim=2)
    rows.add(SINGLE, setting, float((count == 1).float().mean()))
    rows.add(ACTIVE_EXPERTS, setting, float(count.mean()))
    rows.add(USED_EXPERTS, setting, float((active.mean(dim=1) >= 0.01).sum(dim=1).float().mean()))


def claims(rows: Rows) -> list[Claim]:
    """What the paper's and MoEBERT's claims come to here."""

    def mean(metric: str, model: str, nodes: str = AS_TRAINED) -> float:
        return rows.mean(metric, {"model": model, "nodes": nodes})

    def gain(name: str, model: str, other: str) -> Claim:
        measured = rows.mean(GAIN, {"model": model, "less": other})
        return Claim(name=name, measured=measured, relation=">=", needed=0)

    return [
        gain("accuracy of the distilled tree gate less that of hash routing, one expert a token", COMET, HASH),
        gain("accuracy of the distilled tree gate less that of the top-1 gate, one expert a token", COMET, TOP_1),
        gain("accuracy with local search less that of hash routing, one expert a token", SEARCHED, HASH),
        gain("accuracy of the distilled tree gate less that of a dense student of its active width", COMET, DENSE),
        Claim(
            name="accuracy of the teacher less that of the distilled tree gate, one expert a token",
            measured=mean(ACCURACY, TEACHER) - mean(ACCURACY, COMET, ROUNDED),
            relation="<=",
            needed=LOST_TO_TEACHER,
        ),
        Claim(
            name="held-out loss with the layer-wise loss as a part of that without",
            measured=ratio(mean(LOSS, COMET), mean(LOSS, PREDICTIONS_ONLY)),
            relation="<=",
            needed=1,
        ),
        Claim(
            name="share of tokens with exactly one expert under the distilled tree gate, before rounding",
            measured=mean(SINGLE, COMET),
            relation=">=",
            needed=ALONE,
        ),
        Claim(
            name="accuracy that rounding the distilled tree gate takes",
            measured=mean(ACCURACY, COMET) - mean(ACCURACY, COMET, ROUNDED),
            relation="<=",
            needed=LOST_BY_ROUNDING,
        ),
    ]
