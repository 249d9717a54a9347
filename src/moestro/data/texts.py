"""Read documents from files, folders, Hugging Face datasets, the embedded sample, or memory."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import polars as pl

from moestro.data.documents import HELD_OUT_SPLITS, Document
from moestro.data.embedded_sample import Split, check_split, embedded, embedded_domains, in_split
from moestro.directories import some_path

Source: TypeAlias = "str | Path | Mapping[str, Any] | Document | pl.DataFrame | Iterable[Source]"

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_GZIPPED = (".txt", ".jsonl", ".json")  # read from .gz too
_TEXT_FIELDS = ("text", "messages")
# what chat templates are given beside the messages: lists of objects, and others
_LISTS = ("tools", "documents")
_SWITCHES = ("enable_thinking", "reasoning_effort", "date_string", "builtin_tools", "chat_template_kwargs")
_TEMPLATE_FIELDS = (*_LISTS, *_SWITCHES)
_RESERVED = ("conversation", "tokenize", "return_tensors", "return_dict", "padding", "truncation", "max_length")
_SHARD = re.compile(r"-\d+-of-\d+$")


def load_texts(
    source: Source,
    *,
    domain: str | None = None,
    text_field: str | None = None,
    split: Split = "calibration",
) -> list[Document]:
    """Read documents from a source, or from several.

    A source is
    - a `.txt` file (the whole file is one document), `.jsonl` (one record a line), `.json` (a list of records, or one),
      `.parquet`; text formats also with `.gz`;
    - a folder: one written by `datasets.save_to_disk`, or any other, whose files of the kinds above are read in sorted
      order, subfolders included;
    - the name of an embedded domain (`moestro.data.embedded_domains()`), `embedded` for all of them, `embedded:NAME`
      where a file has the same name;
    - any of these behind a label: `"code=path/to/file.jsonl"`;
    - in memory: a record (dict), a `Document`, a polars frame;
    - an iterable of sources (a Hugging Face dataset is one). Within it a string with whitespace in it that is neither
      a file nor has a known suffix is taken as a text itself; give other texts as `{"text": ...}`.

    A record is a text (string) or has `text` or `messages` (chat messages with `role` and `content`), or the one field
    named by `text_field`; it may have `domain` and `split`. Beside messages, `tools` and `documents` (lists of
    objects, or such a list as JSON), `enable_thinking`, `reasoning_effort`, `date_string`, `builtin_tools` and
    `chat_template_kwargs` (an object of further arguments) go to the chat template; other fields are left aside. The
    domain is the record's, else the label, else the argument `domain`, else the file's name without its suffixes (the
    folder's for .txt files in a folder; a shard number like `-00000-of-00003` is dropped), else `text`.

    split: `calibration` gives the documents not declared held out, `heldout` those declared so by `split` being
    heldout, test or validation, `all` both (`split_heldout` then divides them).

    Raises FileNotFoundError for a path that is not there, ImportError where `datasets` is needed but missing, and
    ValueError, naming file and line or record, for what cannot be read: empty or malformed files, records without a
    usable field, unknown suffixes, no text at all, no document of the split.
    """
    check_split(split)
    single = isinstance(source, str | Path | Mapping | Document | pl.DataFrame)
    if not single and not isinstance(source, Iterable):
        raise ValueError(f"a source is a path, a name, a record or a list of these, not a {type(source).__name__}")
    items: Iterable[Any] = [source] if single else source  # type: ignore[assignment]
    groups: dict[str, list[Document]] = {}  # what is in memory counts as one source
    columnar = type(source).__module__.partition(".")[0] == "datasets"
    for number, item in enumerate(items, start=1):
        if not single and isinstance(item, str) and _is_text(item):
            groups.setdefault("the data", []).append(Document(text=item, domain=domain or "text"))
        else:
            name = str(item) if isinstance(item, str | Path) else "the data"
            groups.setdefault(name, []).extend(_read(item, domain, text_field, f"record {number}", columnar))
    if not groups:
        raise ValueError("the data is an empty list")

    chosen = []
    for name, found in groups.items():
        if all(document.blank for document in found):
            raise ValueError(f"{name} has not a single usable token: its {len(found)} documents are blank")
        part = [document for document in found if in_split(document, split)]
        if not part:
            declared = ", ".join(sorted({repr(document.split) for document in found}))
            raise ValueError(
                f"{name} has no document for split={split!r}: its {len(found)} documents declare {declared} "
                f"(held out are: {', '.join(sorted(HELD_OUT_SPLITS))}); "
                "load split='all' and let split_heldout divide them"
            )
        chosen += part
    return chosen


def places_of(sources: Any) -> list[Path]:
    """The files and folders that `load_texts` reads for these sources, so that no output goes there.

    What is in memory has none; nor has an iterator, which could be read only once. Raises what `load_texts` raises for
    a path that is not there.
    """
    if isinstance(sources, str | Path):
        found = _resolve(sources)[1]
        return [] if found is None else [found]
    if not isinstance(sources, list | tuple):
        return []
    paths = [s for s in sources if isinstance(s, Path) or (isinstance(s, str) and not _is_text(s))]
    return [place for path in paths for place in places_of(path)]


def _read(item: Any, domain: str | None, text_field: str | None, where: str, columnar: bool) -> Iterator[Document]:
    """The documents of one source, all splits."""
    if isinstance(item, Document):
        yield item
    elif isinstance(item, Mapping):
        yield _document(item, where, domain or "text", text_field, columnar)
    elif isinstance(item, pl.DataFrame):
        yield from _frame(item, "the frame", domain or "text", text_field)
    elif isinstance(item, str | Path):
        label, path = _resolve(item)
        if path is None:
            name = str(item).rpartition("=")[2]
            for document in embedded(None if name == "embedded" else name.removeprefix("embedded:"), split="all"):
                yield replace(document, domain=label or document.domain)
        elif path.is_dir():
            yield from _folder(path, label or domain, text_field)
        else:
            yield from _file(path, label or domain or _stem(path), text_field)
    else:
        yield from load_texts(item, domain=domain, text_field=text_field, split="all")


def _resolve(source: str | Path) -> tuple[str | None, Path | None]:
    """The label and the path of a source; the path is None where an embedded domain is meant."""
    path = some_path(source, "source").expanduser()
    if isinstance(source, Path):
        if not os.path.exists(path):
            raise FileNotFoundError(f"no file or folder {str(source)!r}")
        return None, path
    label, equals, rest = source.partition("=")
    if equals and not os.path.exists(path) and label and not {"/", "\\"} & set(label):
        return label, _resolve(rest)[1]
    known = embedded_domains()
    if source == "embedded" or source.startswith("embedded:"):
        if source != "embedded" and source.removeprefix("embedded:") not in known:
            raise ValueError(f"no embedded domain {source.removeprefix('embedded:')!r}; there are: {_listed(known)}")
        return None, None
    if source in known:
        if os.path.exists(path):
            raise ValueError(
                f"{source!r} is an embedded domain and also a file or folder here; "
                f"write 'embedded:{source}' for the one or './{source}' for the other"
            )
        return None, None
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"no file or folder {_short(source)}, nor an embedded domain of that name; the embedded domains are: "
            f"{_listed(known)}. A text in memory goes in as {{'text': ...}}"
        )
    return None, path


def _folder(folder: Path, domain: str | None, text_field: str | None) -> Iterator[Document]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        yield from _saved_dataset(folder, domain or _stem(folder), text_field)
        return
    others: set[str] = set()
    empty = True
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            try:
                yield from _folder(entry, domain, text_field)
            except _NothingToReadError as nothing:
                others |= nothing.suffixes
                continue
        elif _suffix(entry) not in SUFFIXES:
            others.add(_suffix(entry) or entry.name)
            continue
        elif _suffix(entry) == ".txt":  # one document a file: the folder is the domain
            yield from _file(entry, domain or _stem(folder), text_field)
        else:
            yield from _file(entry, domain or _stem(entry), text_field)
        empty = False
    if empty:
        raise _NothingToReadError(folder, others)


class _NothingToReadError(ValueError):
    def __init__(self, folder: Path, suffixes: set[str]) -> None:
        self.suffixes = suffixes
        found = f"; it has {', '.join(sorted(suffixes))}" if suffixes else " (it is empty)"
        super().__init__(f"{folder} has no file to read ({', '.join(SUFFIXES)}){found}")


def _file(path: Path, domain: str, text_field: str | None) -> Iterator[Document]:
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: cannot read {suffix or 'a file without suffix'}; give {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
        try:
            lazy = pl.scan_parquet(path)
            columns = lazy.collect_schema().names()
            wanted = [name for name in (*_fields(text_field), *_TEMPLATE_FIELDS, "domain", "split") if name in columns]
            if not set(wanted) & set(_fields(text_field)):
                raise ValueError(_missing(str(path), text_field, columns))
            frame = lazy.select(wanted).collect()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
        yield from _frame(frame, str(path), domain, text_field)
        return
    content = _content(path)
    if not content.strip():
        raise ValueError(f"{path} is empty")
    if suffix == ".txt":
        yield Document(text=content, domain=domain)
    elif suffix == ".json":
        records = _json(content, str(path))
        records = records if isinstance(records, list) else [records]
        if not records:
            raise ValueError(f"{path} is empty: a list without records")
        for number, record in enumerate(records, start=1):
            yield _document(record, f"{path}, record {number}", domain, text_field)
    else:
        # Not splitlines(): JSON strings may carry U+2028 and its like unescaped.
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _document(_json(line, where), where, domain, text_field)


def _frame(frame: pl.DataFrame, name: str, domain: str, text_field: str | None) -> Iterator[Document]:
    if not set(_fields(text_field)) & set(frame.columns):
        raise ValueError(_missing(name, text_field, frame.columns))
    if frame.is_empty():
        raise ValueError(f"{name} is empty: it has no rows")
    for number, row in enumerate(frame.iter_rows(named=True), start=1):
        yield _document(row, f"{name}, row {number}", domain, text_field, columnar=True)


def _saved_dataset(folder: Path, domain: str, text_field: str | None) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{folder} was written by the datasets library, which is not installed: pip install moestro[datasets]"
        ) from error
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow, json and datasets each raise their own kinds
        raise ValueError(f"{folder} is not a readable datasets folder: {error}") from error
    parts = loaded.items() if isinstance(loaded, Mapping) else [(None, loaded)]
    for split, rows in parts:
        name = f"{folder}/{split}" if split else str(folder)
        wanted = [
            column
            for column in (*_fields(text_field), *_TEMPLATE_FIELDS, "domain", "split")
            if column in rows.column_names
        ]
        if not set(wanted) & set(_fields(text_field)):
            raise ValueError(_missing(name, text_field, rows.column_names))
        for number, row in enumerate(rows.select_columns(wanted), start=1):
            yield _document({"split": split, **row}, f"{name}, row {number}", domain, text_field, columnar=True)


def _document(record: Any, where: str, domain: str, text_field: str | None, columnar: bool = False) -> Document:
    """`columnar`: the record is a row, where a key that an object lacks is filled with null."""
    if isinstance(record, str):
        return Document(text=record, domain=domain)
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a {type(record).__name__}; a record is an object or a string")
    field = next((name for name in _fields(text_field) if record.get(name) is not None), None)
    if field is None:
        raise ValueError(_missing(where, text_field, record))
    value = record[field]
    own = {"domain": _label(record.get("domain"), domain), "split": _label(record.get("split"), None)}
    try:
        if isinstance(value, str):
            return Document(text=value, **own)
        if isinstance(value, list):
            template = _template(record, columnar)
            return Document(messages=[_message(m, columnar) for m in value], template=template or None, **own)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    raise ValueError(f"{where}: field {field!r} is a {type(value).__name__}; it must be a text or a list of messages")


def _message(message: Any, columnar: bool) -> Any:
    """A message without null keys: chat templates test for their presence. `content: null` stays beside tool calls."""
    if not isinstance(message, dict):
        return message
    kept = {k: _without_nulls(v) if columnar else v for k, v in message.items() if v is not None}
    if message.get("tool_calls") and "content" in message:
        kept.setdefault("content", None)
    return kept


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _template(record: Mapping[str, Any], columnar: bool) -> dict[str, Any]:
    """What the record gives its chat template. Raises ValueError where that cannot be given."""
    found: dict[str, Any] = {}
    for name in _TEMPLATE_FIELDS:
        value = record.get(name)
        if isinstance(value, str) and (name in _LISTS or name == "chat_template_kwargs"):
            try:
                value = json.loads(value) if value.strip() else None
            except json.JSONDecodeError as error:
                raise ValueError(f"field {name!r} is a text that is not JSON: {error.msg}") from error
        if value is None:
            continue
        if name in _LISTS and not (isinstance(value, list) and all(isinstance(v, Mapping) for v in value)):
            raise ValueError(f"field {name!r} is {str(value)[:60]!r}; it must be a list of objects, or that as JSON")
        if name == "chat_template_kwargs" and not isinstance(value, Mapping):
            raise ValueError(f"field {name!r} is a {type(value).__name__}; it must be an object")
        value = _without_nulls(value) if columnar else value
        if value or name in _SWITCHES:
            found |= value if name == "chat_template_kwargs" else {name: value}
    if taken := sorted(set(found) & set(_RESERVED)):
        raise ValueError(f"chat_template_kwargs has {taken[0]!r}, which says how text is tokenised; leave it out")
    return found


def _label(value: Any, default: str | None) -> Any:
    return default if value is None else str(value)


def _fields(text_field: str | None) -> tuple[str, ...]:
    return _TEXT_FIELDS if text_field is None else (text_field,)


def _missing(where: str, text_field: str | None, present: Iterable[str]) -> str:
    present = list(present)
    wanted = " or ".join(repr(name) for name in _fields(text_field))
    null = [name for name in _fields(text_field) if name in present]
    problem = f"field {null[0]!r} is null" if null else f"no field {wanted}"
    way_out = "" if null else "; name the one with the text by text_field="
    return f"{where}: {problem}; its fields are: {_listed(present)}{way_out}"


def _json(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{where}: not JSON: {error.msg} ({line}column {error.colno})") from error


def _content(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start:,}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error


def _suffix(path: Path) -> str:
    """The suffix that tells the format: of a gzipped text file the inner one."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if suffix == ".gz" and inner in _GZIPPED else suffix


def _stem(path: Path) -> str:
    name = path.resolve().name if path.name in ("", ".", "..") else path.name
    for suffix in (".gz", *SUFFIXES):
        name = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    return _SHARD.sub("", name) or "text"


def _is_text(item: Any) -> bool:
    """Whether a string in a list is itself a text, and not the name of a source."""
    return (
        isinstance(item, str)
        and bool(re.search(r"\s", item.strip()))
        and not item.lower().removesuffix(".gz").endswith(SUFFIXES)
        and not os.path.exists(os.path.expanduser(item.rpartition("=")[2]))
        and not os.path.exists(item)
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "(none)"


def _short(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
