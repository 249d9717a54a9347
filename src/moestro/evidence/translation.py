"""A small encoder-decoder transformer, and the embedded strings of user interfaces that it translates to German.

    source = tokens + [end];    target = tokens + [end], predicted from [end] + tokens
    each block: x + attention(norm(x)), in the decoder + attention to the encoded source, + experts(norm(x))

Every second block, the first included, has E experts, the others one. One vocabulary and one embedding serve source,
target and output. Shapes: B rows, S source and T target positions, H hidden, A heads, D head size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

from moestro.data.parallel import parallel_strings
from moestro.layers import MoE, gather_losses
from moestro.layers.experts import UngatedExperts
from moestro.layers.routers.stochastic import StochasticRouter
from moestro.layers.routers.top_k import TopKRouter
from moestro.routing import RoutingContext
from moestro.train.consistency import IGNORED, LABEL_SMOOTHING, consistency_step

LANGUAGES = ("en", "de")
Part = Literal["training", "development", "test"]
SHARES = {"test": 12, "development": 8}
"""Per cent of the strings."""
LONGEST = 80
"""Characters that a string may have in either language; 9 in 10 have no more."""
VOCABULARY = 1000
PAD, END = 0, 1
PLACEHOLDER = re.compile(r"%\(\w+\)\w|%\w|\$?\{[^}]*\}|\$\w+|<[^>]*>")

HIDDEN, HEADS, WIDTH, BLOCKS, EXPERTS, DROPOUT = 96, 4, 192, 2, 4, 0.2
POSITIONS = 64
"""Tokens that a text may have; the longest here have about 40."""
RATE, WARMUP, BETAS = 2e-3, 200, (0.9, 0.98)
ROWS, POOL = 16, 16
"""Rows of a batch, and batches that are sorted by length together."""

PLAIN = SimpleNamespace(_experts_implementation="eager")
"""Expert after expert: at this size, faster than the backend that sorts tokens and groups experts."""

Routing = Literal["one expert", "switch", "stochastic"]
KeysValues = tuple[Float[Tensor, "b a _ d"], Float[Tensor, "b a _ d"]]
Source = tuple[list[KeysValues], Bool[Tensor, "b 1 1 s"]]
"""The encoded source as each decoder block attends to it, and where it is no padding."""


# Strings


def essence(text: str) -> str:
    """What is left of a text without case, placeholders, digits, punctuation and space."""
    return re.sub(r"[\W\d_]", "", PLACEHOLDER.sub("", text).casefold())


@cache
def strings() -> dict[Part, list[dict[str, str]]]:
    """The parallel strings by part, drawn by a hash of the English essence; every placeholder is an @.

    What shares its essence, in either language, with a test string is in no other part; likewise development and
    training.
    """
    parts: dict[Part, list[dict[str, str]]] = {"test": [], "development": [], "training": []}
    for original in parallel_strings(LANGUAGES):
        string = {language: PLACEHOLDER.sub("@", text) for language, text in original.items()}
        if all(essence(text) and len(text) <= LONGEST for text in string.values()):
            parts[_part(essence(string["en"]))].append(string)
    taken: set[tuple[str, str]] = set()
    for part, found in parts.items():
        keys = [{(language, essence(text)) for language, text in string.items()} for string in found]
        parts[part] = [string for string, own in zip(found, keys) if not own & taken]
        taken.update(*keys)
    return parts


def _part(text: str) -> Part:
    drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 100
    return "test" if drawn < SHARES["test"] else "development" if drawn < sum(SHARES.values()) else "training"


@cache
def vocabulary() -> ByteLevelBPETokenizer:
    """Byte pairs of the training strings in both languages: no text is out of vocabulary."""
    tokenizer = ByteLevelBPETokenizer(add_prefix_space=True)
    texts = [text for string in strings()["training"] for text in string.values()]
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<pad>", "<end>"], show_progress=False)
    return tokenizer


Pair = tuple[list[int], list[int]]
"""Token ids of a string and its translation."""


def pairs(part: Part) -> list[Pair]:
    """Every string of the part and its translation, shortest first."""
    encode = vocabulary().encode
    return sorted(((encode(string["en"]).ids, encode(string["de"]).ids) for string in strings()[part]), key=_length)


def _length(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1])


def text_of(ids: Sequence[int]) -> str:
    """The string that token ids stand for."""
    return vocabulary().decode(list(ids)).strip()


@dataclass(frozen=True)
class Batch:
    source: Int[Tensor, "b s"]
    target: Int[Tensor, "b t"]
    """What the decoder reads: [end], then the target."""
    labels: Int[Tensor, "b t"]
    """The target, then [end]; -100 at padding."""


def batch_of(chosen: Sequence[Pair]) -> Batch:
    """Pairs in one batch, padded on the right."""
    return Batch(
        _padded([[*source, END] for source, _ in chosen], PAD),
        _padded([[END, *target] for _, target in chosen], PAD),
        _padded([[*target, END] for _, target in chosen], IGNORED),
    )


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


def batches(data: Sequence[Pair], rows: int = 128) -> list[Batch]:
    """All of the data in its order."""
    return [batch_of(data[start : start + rows]) for start in range(0, len(data), rows)]


def shuffled(data: Sequence[Pair], seed: int) -> Iterator[Batch]:
    """Batches of similar lengths without end, epoch after epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data), generator=generator).tolist()
        for start in range(0, len(order), ROWS * POOL):
            pool = sorted((data[i] for i in order[start : start + ROWS * POOL]), key=_length)
            found = batches(pool, ROWS)
            for i in torch.randperm(len(found), generator=generator).tolist():
                yield found[i]


# The model


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries, self.out = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.memory = nn.Linear(HIDDEN, 2 * HIDDEN)

    def keys_values(self, x: Float[Tensor, "b s h"]) -> KeysValues:
        keys, values = self.memory(x).chunk(2, dim=-1)
        return _heads(keys), _heads(values)

    def forward(
        self, x: Float[Tensor, "b t h"], memory: KeysValues, mask: Bool[Tensor, "#b 1 #t s"]
    ) -> Float[Tensor, "b t h"]:
        out = F.scaled_dot_product_attention(_heads(self.queries(x)), *memory, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def feed_forward(routing: Routing) -> MoE:
    """One expert, or several behind a Switch gate or drawn for each sentence."""
    count = 1 if routing == "one expert" else EXPERTS
    experts = UngatedExperts(count, HIDDEN, WIDTH, activation="relu", config=PLAIN)
    experts.reset_parameters(HIDDEN**-0.5)
    if routing == "switch":
        return MoE(TopKRouter(HIDDEN, EXPERTS, 1, normalize=False), experts, losses={"load_balance": 0.01})
    return MoE(StochasticRouter(HIDDEN, count, level="sentence"), experts)


class Block(nn.Module):
    """An encoder's block, or with `crossed` a decoder's. Gives its output, and the keys and values of all positions."""

    def __init__(self, routing: Routing, *, crossed: bool):
        super().__init__()
        self.attention, self.feed_forward = Attention(), feed_forward(routing)
        self.cross = Attention() if crossed else None
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(3 if crossed else 2))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(
        self,
        x: Float[Tensor, "b t h"],
        mask: Bool[Tensor, "#b 1 #t k"],
        context: RoutingContext,
        *,
        source: tuple[KeysValues, Bool[Tensor, "b 1 1 s"]] | None = None,
        past: KeysValues | None = None,
    ) -> tuple[Float[Tensor, "b t h"], KeysValues]:
        normed = self.norms[0](x)
        keys, values = self.attention.keys_values(normed)
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        x = x + self.dropout(self.attention(normed, (keys, values), mask))
        if self.cross is not None and source is not None:
            x = x + self.dropout(self.cross(self.norms[1](x), *source))
        return x + self.dropout(self.feed_forward(self.norms[-1](x), context)), (keys, values)


class Translator(nn.Module):
    """Calling it with a Batch gives the logits of its labels."""

    def __init__(self, routing: Routing):
        super().__init__()
        kinds: list[Routing] = [routing if i % 2 == 0 else "one expert" for i in range(BLOCKS)]
        self.encoder = nn.ModuleList(Block(kind, crossed=False) for kind in kinds)
        self.decoder = nn.ModuleList(Block(kind, crossed=True) for kind in kinds)
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))
        self.embedding, self.positions = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(POSITIONS, HIDDEN)
        self.dropout = nn.Dropout(DROPOUT)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=HIDDEN**-0.5)

    def forward(self, batch: Batch) -> Float[Tensor, "b t v"]:
        return self.decode(batch.target, self.encode(batch.source), real=batch.labels != IGNORED)[0]

    def encode(self, ids: Int[Tensor, "b s"]) -> Source:
        real = ids != PAD
        mask = real[:, None, None]
        x = self._embedded(ids, 0)
        for number, block in enumerate(self.encoder):
            x, _ = block(x, mask, RoutingContext(shape=_shape(ids), mask=real, layer=number))
        x = self.norms[0](x)
        return [block.cross.keys_values(x) for block in self.decoder], mask  # type: ignore[operator, union-attr]

    def decode(
        self,
        ids: Int[Tensor, "b t"],
        source: Source,
        *,
        real: Bool[Tensor, "b t"] | None = None,
        past: list[KeysValues] | None = None,
    ) -> tuple[Float[Tensor, "b t v"], list[KeysValues]]:
        """Logits of what follows each of `ids`, which come after `past`; and the keys and values of both."""
        start = 0 if past is None else past[0][0].shape[2]
        causal = torch.ones(ids.shape[1], start + ids.shape[1], dtype=torch.bool).tril(start)[None, None]
        x = self._embedded(ids, start)
        kept = []
        for number, block in enumerate(self.decoder):
            context = RoutingContext(shape=_shape(ids), mask=real, layer=BLOCKS + number, start=start)
            own = None if past is None else past[number]
            x, keys_values = block(x, causal, context, source=(source[0][number], source[1]), past=own)
            kept.append(keys_values)
        return F.linear(self.norms[1](x), self.embedding.weight), kept

    def _embedded(self, ids: Tensor, start: int) -> Tensor:
        end = start + ids.shape[1]
        if end > POSITIONS:
            raise ValueError(f"a text of {end} tokens does not fit the model's {POSITIONS} positions; shorten it")
        return self.dropout((self.embedding(ids) + self.positions.weight[start:end]) * HIDDEN**0.5)


def _shape(ids: Tensor) -> tuple[int, int]:
    return ids.shape[0], ids.shape[1]


# Training and translating


def train(model: Translator, data: Iterator[Batch], steps: int, *, alpha: float | None) -> Iterator[int]:
    """Yields the number of steps taken, after each; between steps the model may be tested, and back in training mode.

    Adam with a warm-up and then 1 / sqrt(step), which does not hang on how many steps follow. alpha: weight of the
    consistency loss between two passes over each batch; None: one pass.
    """
    optimiser = torch.optim.Adam(model.parameters(), RATE, betas=BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARMUP, (WARMUP / (step + 1)) ** 0.5)
    )
    for step in range(1, steps + 1):
        batch = next(data)
        if alpha is None:
            logits = model(batch).flatten(0, 1)
            loss = F.cross_entropy(logits, batch.labels.flatten(), label_smoothing=LABEL_SMOOTHING)
            loss = loss + sum(gather_losses(model).values())
        else:
            loss = consistency_step(model, batch, batch.labels, alpha=alpha, reduction="mean")["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        yield step


@torch.no_grad()
def likelihood(model: Translator, data: Sequence[Batch]) -> tuple[float, float]:
    """(negative log-likelihood in nats, accuracy) per target token, the end of the text being one."""
    loss, right, tokens = 0.0, 0, 0
    for batch in data:
        logits = model(batch).flatten(0, 1)
        labels = batch.labels.flatten()
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(dim=-1) == labels).sum())
        tokens += int((labels != IGNORED).sum())
    return loss / tokens, right / tokens


@torch.no_grad()
def greedy(model: Translator, ids: Int[Tensor, "b s"], *, limit: int = POSITIONS) -> list[list[int]]:
    """The likeliest token, again and again until the end or `limit` tokens; the end is left out."""
    source = model.encode(ids)
    past = None
    following = torch.full((len(ids), 1), END)
    found = following[:, :0]
    while found.shape[1] < limit and not (found == END).any(dim=1).all():
        logits, past = model.decode(following, source, past=past)
        following = logits.argmax(dim=-1)
        found = torch.cat([found, following], dim=1)
    rows = found.tolist()
    return [row[: row.index(END)] if END in row else row for row in rows]


def need_sacrebleu() -> None:
    """Raises ImportError where the library that computes BLEU and chrF is missing."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise ImportError("BLEU and chrF are computed by sacrebleu, which is not installed: pip install sacrebleu")


def bleu_chrf(translations: Sequence[str], references: Sequence[str]) -> tuple[float, float]:
    """Corpus BLEU and chrF, from 0 to 100, by sacrebleu's defaults."""
    need_sacrebleu()
    import sacrebleu

    metrics = (sacrebleu.corpus_bleu, sacrebleu.corpus_chrf)
    bleu, chrf = (metric(list(translations), [list(references)]).score for metric in metrics)
    return bleu, chrf
