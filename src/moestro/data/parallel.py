"""The embedded parallel strings: the same user-interface text in English and up to ten other languages."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from importlib.resources import files


def parallel_strings(languages: Sequence[str] | None = None) -> list[dict[str, str]]:
    """One dict {language: text} per string, never trained on by the bundled models.

    languages: keep these languages only, and of the strings those that have all of them; None keeps everything.
    Raises ValueError for a language that no string has, naming those that are there.
    """
    data = (files("moestro.data") / "sample" / "parallel" / "strings.jsonl.gz").read_bytes()
    strings = [json.loads(line) for line in gzip.decompress(data).decode("utf-8").splitlines()]
    if languages is None:
        return strings
    known = sorted({language for string in strings for language in string})
    for language in languages:
        if language not in known:
            raise ValueError(f"no parallel strings in {language!r}; there are: {', '.join(known)}")
    return [
        {language: string[language] for language in languages}
        for string in strings
        if all(language in string for language in languages)
    ]
