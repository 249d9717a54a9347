"""Tokenised training rows on disk: documents of one domain packed into rows of fixed length, rows shuffled.

A row holds tokens of one domain (`<bos> document <eos> <bos> document ...`, cut at the row's end), so that losses
per domain are exact; a batch of neighbouring rows mixes domains because the rows are shuffled once, by seed.
"""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from moestro.train.corpus import WEIGHTS, Document

ROW = 512


@dataclass(frozen=True)
class Rows:
    """Packed rows `tokens [R, T]` (memory-mapped) and the domain index of each row."""

    tokens: np.ndarray
    domain: np.ndarray
    domains: list[str]


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


def write_rows(folder: Path, split: str, tokens: np.ndarray, domain: np.ndarray) -> None:
    """Save rows so that a killed run never leaves half a file behind."""
    for name, array in ((f"{split}.domain", domain), (f"{split}.tokens", tokens)):
        np.save(folder / f"{name}.part.npy", array)
        os.replace(folder / f"{name}.part.npy", folder / f"{name}.npy")
    (folder / "domains.json").write_text(json.dumps(list(WEIGHTS)))


def read_rows(folder: Path, split: str) -> Rows:
    """Memory-mapped rows of `split` ("train" or "heldout")."""
    return Rows(
        tokens=np.load(folder / f"{split}.tokens.npy", mmap_mode="r"),
        domain=np.load(folder / f"{split}.domain.npy"),
        domains=json.loads((folder / "domains.json").read_text()),
    )
