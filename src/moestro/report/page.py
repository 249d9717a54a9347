"""What all pages share: their templates, the hash of their script, and that they are written whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from moestro.report import figures

CONTROL = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {0x7F: 0x2421}
"""Control characters, which HTML cannot hold, to the pictures of them."""


def visible(text: str) -> str:
    """Text as it can stand in HTML: control characters become pictures of themselves."""
    return text.replace("\r\n", "\n").translate(CONTROL)


def templates() -> Environment:
    """The templates of this folder; what is put into them is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": figures.size_text,
        "loss": figures.loss_text,
        "signed": figures.signed,
        "significant": figures.significant,
        "percent": figures.percent_text,
        "listing": figures.listing,
        "ranges": figures.ranges,
        "thousands": "{:,}".format,
        "visible": visible,
    }
    return environment


def script(environment: Environment, name: str) -> tuple[Markup, str]:
    """(a page's own script, the hash by which its content security policy lets it alone run)"""
    text = Markup(environment.get_template(name).render())
    return text, base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_whole(html: str, path: Path) -> None:
    """Write the page to `path` at once or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.write_bytes(html.encode("utf-8", "replace"))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
