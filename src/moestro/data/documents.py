"""A document with its domain, and how documents are divided into calibration and held-out parts."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

# A document whose declared split has one of these names is never calibrated on.
HELD_OUT_SPLITS = frozenset({"heldout", "test", "validation"})


@dataclass(frozen=True)
class Document:
    """One text or one conversation.

    text: the text; None where the document is a conversation.
    messages: chat messages, each with at least `role` and `content`; None where the document is a text.
    domain: the label that results are grouped by.
    template: what the conversation's chat template is given beside the messages (`tools`, `documents`, ...).
    split: what the source declared (`calibration`, `heldout`, `train`, ...); None where it declared nothing.
    """

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    domain: str = "text"
    split: str | None = None
    template: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise ValueError("a document has either a text or messages")
        if self.template and self.messages is None:
            raise ValueError(f"a text goes through no chat template, so it cannot have {', '.join(self.template)}")
        for number, message in enumerate(self.messages or [], start=1):
            if not isinstance(message, dict) or "role" not in message or not ({"content", "tool_calls"} & set(message)):
                raise ValueError(f"message {number} is {_short(message)}; each needs `role` and `content`")

    @property
    def held_out(self) -> bool:
        """Whether the source declared this document as held out."""
        return self.split in HELD_OUT_SPLITS

    @property
    def blank(self) -> bool:
        """Whether there is nothing but whitespace to read."""
        if self.text is not None:
            return not self.text.strip()
        contents = [message.get("content") or message.get("tool_calls") for message in self.messages or []]
        return not any(content.strip() if isinstance(content, str) else content for content in contents)

    @property
    def key(self) -> str:
        """What the document says: equal for equal contents, whatever the domain and split."""
        if self.text is not None:
            return self.text
        said = self.messages if not self.template else [self.messages, self.template]
        return json.dumps(said, sort_keys=True, ensure_ascii=False, default=str)


def split_heldout(
    documents: Iterable[Document], fraction: float = 0.1, *, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Divide documents into a calibration part and a held-out part that share no content.

    Domain by domain: where the source declares held-out documents, exactly those are held out. Otherwise about
    `fraction` of the distinct contents (at least one, never all) are, chosen by a hash of content and seed, so that
    neither the order of the documents nor copies of a document matter. A domain with a single text is cut in two at
    a line or word boundary, the end being held out, with a warning. A calibration document whose content is also held
    out (in any domain) is dropped, with a warning. Both parts keep the order of `documents`; blank documents are
    left out.

    Raises ValueError for a fraction outside (0, 1), and where a domain would have an empty part.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} holds out everything or nothing; give a number between 0 and 1")
    usable = [document for document in documents if not document.blank]
    if not usable:
        raise ValueError("there is nothing to split: not a single document with text")

    calibration: list[tuple[int, Document]] = []
    heldout: list[tuple[int, Document]] = []
    for domain in dict.fromkeys(document.domain for document in usable):
        members = [(i, document) for i, document in enumerate(usable) if document.domain == domain]
        if any(document.held_out for _, document in members):
            chosen = {document.key for _, document in members if document.held_out}
        else:
            distinct = sorted({document.key for _, document in members}, key=lambda key: _rank(key, seed))
            if len(distinct) == 1:
                number, document = members[0]
                first, last = _cut(document, fraction)
                calibration.append((number, first))
                heldout.append((number, last))
                continue
            chosen = set(distinct[: min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)])
        for number, document in members:
            (heldout if document.key in chosen else calibration).append((number, document))

    secret = {document.key for _, document in heldout}
    kept = [(number, document) for number, document in calibration if document.key not in secret]
    if len(kept) < len(calibration):
        warnings.warn(
            f"{len(calibration) - len(kept)} calibration documents are copies of held-out ones; they are left out",
            stacklevel=2,
        )
    for domain in dict.fromkeys(document.domain for document in usable):
        if all(document.domain != domain for _, document in kept):
            raise ValueError(
                f"domain {domain!r} has no calibration document beside the held-out ones; "
                "give it more documents, or declare fewer of them held out"
            )
    return [d for _, d in sorted(kept, key=itemgetter(0))], [d for _, d in sorted(heldout, key=itemgetter(0))]


def domains_of(documents: Sequence[Document]) -> tuple[str, ...]:
    """The domain names, sorted: a domain's number in a token batch is its place in this tuple."""
    return tuple(sorted({document.domain for document in documents}))


def _rank(key: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _cut(document: Document, fraction: float) -> tuple[Document, Document]:
    """The first and the last part of a single text, cut at the line (else word) boundary nearest to the fraction."""
    advice = "give a second document, or held-out documents of its own"
    if document.text is None:
        raise ValueError(f"domain {document.domain!r} has a single conversation, which cannot be divided; {advice}")
    text = document.text.strip()
    wanted = len(text) * (1 - fraction)
    # A line boundary must lie near the wanted place; otherwise any blank does.
    lines = [i + 1 for i, char in enumerate(text) if char == "\n" and abs(i + 1 - wanted) <= len(text) * fraction / 2]
    cuts = lines or [i + 1 for i, char in enumerate(text) if char.isspace()]
    if not cuts:
        raise ValueError(f"domain {document.domain!r} has a single text of one word, which cannot be divided; {advice}")
    cut = min(cuts, key=lambda i: abs(i - wanted))
    warnings.warn(
        f"domain {document.domain!r} has a single document: its last {len(text) - cut:,} of {len(text):,} characters "
        "are held out, so held-out and calibration text are parts of one whole",
        stacklevel=3,
    )
    return replace(document, text=text[:cut]), replace(document, text=text[cut:])


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
