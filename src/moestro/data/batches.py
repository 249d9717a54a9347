"""Token batches: documents cut into windows, batched by length, each token traceable to its document.

A row of a batch is a window: `max_length` (at the end of a document fewer) consecutive tokens of one document. The
windows of a document do not overlap, so each of its tokens occurs exactly once in a pass. Rows are ordered by length,
longest first: little padding, the peak of memory in the first batch, and the same order whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from moestro.data.documents import Document, domains_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_BATCH_SIZE = 8
_TOKENIZE_AT_ONCE = 512  # documents handed to the tokenizer in one call


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """B windows of up to T tokens, padded on one side.

    input_ids, attention_mask: [B, T]; the mask is 1 on tokens and 0 on padding.
    sample: [B], the number of the row's document in the whole data, the same in every shard.
    start: [B], the place in its document of the row's first token.
    domain: [B], an index into `domains`, the names.
    """

    input_ids: Int[Tensor, "b t"]
    attention_mask: Int[Tensor, "b t"]
    sample: Int[Tensor, " b"]
    start: Int[Tensor, " b"]
    domain: Int[Tensor, " b"]
    domains: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch, padding not counted."""
        return int(self.attention_mask.sum())

    @property
    def position(self) -> Int[Tensor, "b t"]:
        """Each token's place in its document, [B, T]; -1 on padding."""
        within = self.attention_mask.cumsum(dim=1) - 1
        return torch.where(self.attention_mask.bool(), self.start[:, None] + within, -1)

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch with its tensors on a device."""
        tensors = ("input_ids", "attention_mask", "sample", "start", "domain")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


@dataclass(frozen=True, eq=False, repr=False)
class TokenBatches:
    """Tokenised data as a fixed sequence of `TokenBatch`es that can be passed over any number of times.

    It has a length (batches), can be indexed, pickled and sharded; the tokens lie in one flat array. Made by
    `token_batches`.
    """

    token_ids: np.ndarray  # [tokens of all documents]
    offset: np.ndarray  # [windows] of the window's first token in token_ids
    length: np.ndarray  # [windows]
    sample: np.ndarray  # [windows]
    start: np.ndarray  # [windows]
    domain: np.ndarray  # [windows]
    domains: tuple[str, ...]
    plan: tuple[np.ndarray, ...]  # per batch, its windows
    max_length: int
    batch_size: int | None
    max_tokens_per_batch: int | None
    pad_id: int
    padding_side: Literal["left", "right"]

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[TokenBatch]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> TokenBatch:
        rows = self.plan[number]
        width = int(self.length[rows].max())
        input_ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        attention_mask = np.zeros((len(rows), width), dtype=np.int64)
        for row, window in enumerate(rows):
            offset, length = int(self.offset[window]), int(self.length[window])
            place = slice(0, length) if self.padding_side == "right" else slice(width - length, width)
            input_ids[row, place] = self.token_ids[offset : offset + length]
            attention_mask[row, place] = 1
        return TokenBatch(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(attention_mask),
            sample=torch.from_numpy(self.sample[rows]),
            start=torch.from_numpy(self.start[rows]),
            domain=torch.from_numpy(self.domain[rows]),
            domains=self.domains,
        )

    def __repr__(self) -> str:
        by_domain = ", ".join(f"{name} {count:,}" for name, count in self.tokens_by_domain.items())
        return f"TokenBatches({len(self):,} batches, {self.num_tokens:,} tokens: {by_domain})"

    @property
    def num_tokens(self) -> int:
        """Tokens in one pass, padding not counted."""
        return int(self.length[self._windows].sum())

    @property
    def tokens_by_domain(self) -> dict[str, int]:
        """Tokens in one pass per domain name; a domain without tokens counts 0."""
        windows = self._windows
        counts = np.bincount(self.domain[windows], weights=self.length[windows], minlength=len(self.domains))
        return {name: int(count) for name, count in zip(self.domains, counts)}

    def shard(self, rank: int, world: int) -> TokenBatches:
        """Every `world`-th batch from `rank` on: over all ranks, each batch exactly once."""
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} is not within a world of {world}: give 0 to {world - 1}")
        return replace(self, plan=self.plan[rank::world])

    @property
    def _windows(self) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype=np.int64), *self.plan])


def token_batches(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    batch_size: int | None = None,
    max_tokens_per_batch: int | None = None,
    overflow: Literal["split", "refuse"] = "split",
    padding_side: Literal["left", "right"] = "right",
) -> TokenBatches:
    """Tokenise documents and batch them in windows of at most `max_length` tokens.

    A text gets the tokenizer's own special tokens; a conversation goes through its chat template. `sample` is the
    document's place in `documents`; blank documents give no tokens. Batches have `batch_size` rows (8 where neither is
    given), or as many as keep rows x longest row within `max_tokens_per_batch`.

    overflow: what to do with a document longer than `max_length`: `split` it into windows (each is read without what
    came before), or `refuse` it.

    Raises ValueError, before a batch is made, for a conversation where the tokenizer has no chat template (or the
    template rejects it), for a refused document, a `max_tokens_per_batch` below the longest row, and data without a
    single token.
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length} holds no token; give at least 1")
    if batch_size is not None and max_tokens_per_batch is not None:
        raise ValueError("give batch_size or max_tokens_per_batch, not both")
    for name, size in (("batch_size", batch_size), ("max_tokens_per_batch", max_tokens_per_batch)):
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} makes empty batches; give at least 1")
    if overflow not in ("split", "refuse"):
        raise ValueError(f"overflow={overflow!r}; it is 'split' or 'refuse'")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r}; it is 'left' or 'right'")

    domains = domains_of(documents)
    parts: list[np.ndarray] = [np.empty(0, dtype=np.int32)]
    windows: list[tuple[int, int, int, int, int]] = []  # offset, length, sample, start, domain
    total = 0
    for sample, (document, ids) in enumerate(zip(documents, _tokenize(documents, tokenizer))):
        if overflow == "refuse" and len(ids) > max_length:
            raise ValueError(
                f"document {sample} (domain {document.domain!r}) has {len(ids):,} tokens; the context is "
                f'{max_length:,}; pass overflow="split" to read it in windows'
            )
        domain = domains.index(document.domain)
        for start in range(0, len(ids), max_length):
            windows.append((total + start, min(max_length, len(ids) - start), sample, start, domain))
        parts.append(np.asarray(ids, dtype=np.int32))
        total += len(ids)
    if not windows:
        raise ValueError(f"not a single usable token in {len(documents)} documents")

    offset, length, sample_of, start_of, domain_of = np.array(windows, dtype=np.int64).T.copy()
    batches = TokenBatches(
        token_ids=np.concatenate(parts),
        offset=offset,
        length=length,
        sample=sample_of,
        start=start_of,
        domain=domain_of,
        domains=domains,
        plan=(),
        max_length=max_length,
        batch_size=batch_size if batch_size or max_tokens_per_batch else DEFAULT_BATCH_SIZE,
        max_tokens_per_batch=max_tokens_per_batch,
        pad_id=_pad_id(tokenizer),
        padding_side=padding_side,
    )
    return _planned(batches, np.arange(len(windows)))


def limit_tokens(batches: TokenBatches, n: int, *, per_domain: bool = True, seed: int = 0) -> TokenBatches:
    """A random part of the data of exactly `n` tokens per domain (over all domains where `per_domain` is False).

    Whole windows are drawn without replacement; the last one drawn is shortened to fit. A domain with fewer tokens is
    kept whole. The draw depends on the data, `max_length` and `seed` alone, and a larger `n` adds to that of a smaller
    one. Take it before `shard`. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n} keeps no token; give at least 1")
    windows = np.sort(batches._windows)
    groups = [windows[batches.domain[windows] == d] for d in range(len(batches.domains))] if per_domain else [windows]
    length = batches.length.copy()
    drawn = []
    for group in groups:
        # One stream per group: dropping a domain from the data changes no other domain's draw.
        order = np.random.default_rng(seed).permutation(group)
        before = np.cumsum(length[order]) - length[order]
        order, before = order[before < n], before[before < n]
        length[order] = np.minimum(length[order], n - before)
        drawn.append(order)
    return _planned(replace(batches, length=length), np.concatenate(drawn))


def _planned(batches: TokenBatches, windows: np.ndarray) -> TokenBatches:
    """The batches of the given windows: longest first, then by document and place in it."""
    order = windows[np.lexsort((batches.start[windows], batches.sample[windows], -batches.length[windows]))]
    limit = batches.max_tokens_per_batch
    if limit is not None and len(order) and int(batches.length[order[0]]) > limit:
        raise ValueError(
            f"max_tokens_per_batch={limit:,} is less than the longest row ({int(batches.length[order[0]]):,} tokens); "
            "raise it or lower max_length"
        )
    plan = []
    first = 0
    while first < len(order):
        rows = batches.batch_size or (limit or 0) // int(batches.length[order[first]])
        plan.append(order[first : first + rows])
        first += rows
    return replace(batches, plan=tuple(plan))


def _tokenize(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The token ids of each document, in order."""
    # Rendered first, all of it, so that a conversation that cannot be is refused before the work of tokenising.
    conversations = {
        number: _render(document, tokenizer, f"document {number} (domain {document.domain!r})")
        for number, document in enumerate(documents)
        if document.messages is not None and not document.blank
    }
    for first in range(0, len(documents), _TOKENIZE_AT_ONCE):
        numbers = range(first, min(first + _TOKENIZE_AT_ONCE, len(documents)))
        texts = [n for n in numbers if n not in conversations and not documents[n].blank]
        chats = [n for n in numbers if n in conversations]
        ids: dict[int, list[int]] = {}
        ids.update(zip(texts, _ids([documents[n].text or "" for n in texts], tokenizer, special=True)))
        # A chat template writes the special tokens itself.
        ids.update(zip(chats, _ids([conversations[n] for n in chats], tokenizer, special=False)))
        for number in numbers:
            yield ids.get(number, [])


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
    return encoded["input_ids"]


def _render(document: Document, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where} is a conversation, but the tokenizer has no chat template; "
            "give texts, or set tokenizer.chat_template"
        )
    try:
        messages: Any = document.messages
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **(document.template or {})))
    except Exception as error:  # templates raise whatever they like
        raise ValueError(f"{where}: the tokenizer's chat template rejects it: {error}") from error


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any valid id will do under the mask; the tokenizer's own choice where it has one."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0
