"""The multi-domain sample that comes with moestro: short documents per domain, for calibration and held out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from moestro.data.documents import Document

Split = Literal["calibration", "heldout", "all"]
SPLITS: tuple[Split, ...] = ("calibration", "heldout", "all")


def embedded_domains(directory: Path | None = None) -> tuple[str, ...]:
    """The domain names of the embedded sample, sorted; of another directory of `*.jsonl.gz` where one is given."""
    return tuple(sorted({document.domain for document in _read(directory)}))


def embedded(
    domains: Sequence[str] | str | None = None,
    split: Split = "calibration",
    *,
    directory: Path | None = None,
) -> list[Document]:
    """Documents of the embedded sample, domain by domain in the order asked for (sorted where `domains` is None).

    Raises ValueError for a domain that is not there, naming those that are, and for an unknown split.
    """
    known = embedded_domains(directory)
    wanted = known if domains is None else (domains,) if isinstance(domains, str) else tuple(dict.fromkeys(domains))
    check_split(split)
    for domain in wanted:
        if domain not in known:
            raise ValueError(f"no embedded domain {domain!r}; there are: {', '.join(known) or '(none)'}")
    return [
        document
        for domain in wanted
        for document in _read(directory)
        if document.domain == domain and in_split(document, split)
    ]


def check_split(split: str) -> None:
    """Refuse a split name that is not known."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}; it is one of {', '.join(SPLITS)}")


def in_split(document: Document, split: Split) -> bool:
    """Whether a document belongs to a split; one that declares nothing belongs to calibration."""
    return split == "all" or document.held_out == (split == "heldout")


@lru_cache(maxsize=4)
def _read(directory: Path | None) -> tuple[Document, ...]:
    folder: Traversable = files("moestro.data") / "sample" if directory is None else directory
    if not folder.is_dir():
        return ()
    documents = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".jsonl.gz"):
            lines = gzip.decompress(file.read_bytes()).decode("utf-8").strip("\n").split("\n")
            for record in map(json.loads, lines):
                documents.append(Document(text=record["text"], domain=record["domain"], split=record["split"]))
    return tuple(documents)
