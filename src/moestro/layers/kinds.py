"""Parts by name: how a config entry becomes a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

Kind = str | dict[str, Any]
"""A name, or {"kind": name, and that kind's options}."""


def named(table: Mapping[str, Any], kind: Kind, what: str) -> tuple[Any, dict[str, Any]]:
    """(entry of `table`, options) of a config value. Raises ValueError that lists what is known."""
    options = {"kind": kind} if isinstance(kind, str) else dict(kind)
    name = str(options.pop("kind", None))
    if name not in table:
        raise ValueError(f"{what}={name!r} is not known; there are {', '.join(table)}")
    return table[name], options


def make(maker: Callable[..., Any], *sizes: int, options: Mapping[str, Any], offered: Mapping[str, Any]) -> Any:
    """maker(*sizes, **options), with those of the `offered` arguments that it has and its table entry leaves open."""
    wanted = inspect.signature(maker).parameters
    fixed = maker.keywords if isinstance(maker, partial) else {}
    given = {name: value for name, value in offered.items() if name in wanted and name not in fixed}
    return maker(*sizes, **{**given, **options})
