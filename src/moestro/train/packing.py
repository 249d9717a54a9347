"""Tokenised training rows on disk: documents of one domain packed into rows of fixed length.

A row holds tokens of one domain (`<bos> document <eos> <bos> document ...`, cut at the row's end), so that losses
per domain are exact. Rows are shuffled by seed, so that a batch mixes domains: `pack` writes them shuffled once (the
bundled models' recipe), `batch_rows` draws an order for every pass. Training reads them memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from moestro import data
from moestro.train.corpus import WEIGHTS, Document

ROW = 512


@dataclass(frozen=True)
class Rows:
    """Packed rows `tokens [R, T]` (memory-mapped) and the domain index of each row."""

    tokens: np.ndarray
    domain: np.ndarray
    domains: list[str]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.tokens.shape[1]

    def describe(self) -> dict[str, Any]:
        """What tells one data set from another without reading all of it."""
        digest = hashlib.blake2b(np.ascontiguousarray(self.domain).tobytes(), digest_size=8)
        for part in (self.tokens[:64], self.tokens[-64:]):
            digest.update(np.ascontiguousarray(part).tobytes())
        return {"rows": len(self), "length": self.length, "domains": list(self.domains), "digest": digest.hexdigest()}


@lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def batch_rows(rows: int, batch: int, step: int, seed: int | None) -> np.ndarray:
    """Numbers of the rows of batch `step`: every row once per pass, in an order drawn by (seed, pass).

    seed=None: as they lie. A batch may reach over the end of a pass.
    """
    places = np.arange(step * batch, (step + 1) * batch)
    if seed is None:
        return places % rows
    return np.array([_permutation(rows, seed, int(p) // rows)[p % rows] for p in places])


def pack_documents(
    documents: Sequence[data.Document], tokenizer: Any, length: int, *, seed: int = 0, split: str = "train"
) -> Rows:
    """Rows of `length` tokens, one domain each: its documents in an order drawn by seed, each closed by the end token.

    What is left over at a domain's end is dropped. Raises ValueError where a domain does not fill a row.
    """
    batches = data.token_batches(documents, tokenizer, max_length=1 << 40, batch_size=1)
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    blocks, labels = [], []
    for number, name in enumerate(batches.domains):
        windows = np.flatnonzero(batches.domain == number)
        np.random.default_rng([seed, number]).shuffle(windows)
        parts = [p for w in windows for p in (batches.token_ids[batches.offset[w] :][: batches.length[w]], end)]
        stream = np.concatenate(parts).astype(dtype)
        count = len(stream) // length
        if not count:
            raise ValueError(
                f"domain {name!r} has {len(stream)} {split} tokens, less than one row of {length}; "
                "give it more text, or shorten the rows"
            )
        blocks.append(stream[: count * length].reshape(count, length))
        labels.append(np.full(count, number, dtype=np.int32))
    return Rows(np.concatenate(blocks), np.concatenate(labels), list(batches.domains))


def token_stream(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int, rng: random.Random) -> np.ndarray:
    """`length` tokens of the documents in shuffled order, reshuffled for every further pass over them."""
    encoded = [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts)]  # each starts with bos
    stream: list[int] = []
    while len(stream) < length:
        rng.shuffle(encoded)
        for ids in encoded:
            stream += [*ids, tokenizer.eos_token_id]
            if len(stream) >= length:
                break
    return np.asarray(stream[:length], dtype=np.uint16)


def pack(
    documents: list[Document], tokenizer: PreTrainedTokenizerFast, rows_of: dict[str, int], *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [R, T], domain index [R]), rows of all domains shuffled together."""
    texts = defaultdict(list)
    for document in documents:
        texts[document.domain].append(document.text)
    blocks, labels = [], []
    for index, (domain, count) in enumerate(rows_of.items()):
        stream = token_stream(texts[domain], tokenizer, count * ROW, random.Random(f"{seed}-{domain}"))
        blocks.append(stream.reshape(count, ROW))
        labels.append(np.full(count, index, dtype=np.uint8))
    order = np.random.default_rng(seed).permutation(sum(rows_of.values()))
    return np.concatenate(blocks)[order], np.concatenate(labels)[order]


def training_rows(tokens: int) -> dict[str, int]:
    """Rows per domain for a training set of about `tokens` tokens."""
    total = sum(WEIGHTS.values())
    return {domain: round(share / total * tokens / ROW) for domain, share in WEIGHTS.items()}


def write_rows(folder: Path, split: str, rows: Rows) -> None:
    """Save rows so that a killed run never leaves half a file behind."""
    (folder / "domains.json").write_text(json.dumps(rows.domains))
    for name, array in ((f"{split}.domain", rows.domain), (f"{split}.tokens", rows.tokens)):
        np.save(folder / f"{name}.part.npy", array)
        os.replace(folder / f"{name}.part.npy", folder / f"{name}.npy")


def read_rows(folder: Path, split: str) -> Rows:
    """Memory-mapped rows of `split` ("train" or "heldout")."""
    return Rows(
        tokens=np.load(folder / f"{split}.tokens.npy", mmap_mode="r"),
        domain=np.load(folder / f"{split}.domain.npy"),
        domains=json.loads((folder / "domains.json").read_text()),
    )
