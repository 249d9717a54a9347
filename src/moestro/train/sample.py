"""The embedded sample: a part of the corpus that quartet and solo never trained on, as package data."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from moestro.train.corpus import HELD_OUT_STRINGS, WEIGHTS, Document, split_of
from moestro.train.sources import LANGUAGES

TOKENS = {"calibration": 44_000, "heldout": 22_000}  # per domain, where the corpus has them
PARALLEL_STRINGS = 1500
MIN_LANGUAGES = 8


def choose(
    documents: list[Document], tokenizer: PreTrainedTokenizerFast, *, seed: int = 0
) -> dict[str, list[Document]]:
    """Documents per domain, calibration then heldout, up to TOKENS of each."""
    chosen: dict[str, list[Document]] = {domain: [] for domain in WEIGHTS}
    for split, limit in TOKENS.items():
        for domain in chosen:
            part = [d for d in documents if d.split == split and d.domain == domain]
            random.Random(f"{seed}-{domain}").shuffle(part)
            left = limit
            for document in part:
                if left > 0:
                    chosen[domain].append(document)
                    left -= len(tokenizer.backend_tokenizer.encode(document.text).ids)
    return chosen


def write_gzip(path: Path, records: Iterable[dict]) -> None:
    """One JSON record a line; the same records give the same bytes."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))


def write_sample(folder: Path, documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> None:
    """`DOMAIN.jsonl.gz` for every domain."""
    for domain, part in choose(documents, tokenizer).items():
        write_gzip(
            folder / f"{domain}.jsonl.gz", ({"text": d.text, "domain": d.domain, "split": d.split} for d in part)
        )


def write_parallel(path: Path, phrases: Iterable[dict[str, str]]) -> None:
    """Held-out strings with English and at least MIN_LANGUAGES translations, the most translated first."""
    held = [p for p in phrases if split_of(p["en"], HELD_OUT_STRINGS) != "train" and len(p) > MIN_LANGUAGES]
    held.sort(key=lambda p: (-len(p), p["en"]))
    order = ("en", *LANGUAGES)
    records = [{language: p[language] for language in order if language in p} for p in held[:PARALLEL_STRINGS]]
    write_gzip(path, sorted(records, key=lambda p: p["en"]))
