"""README.md of a saved checkpoint: what it was made from, what was done, what it cost, how to load it.

Written from plain data alone, and holds nothing of the texts that a model was cut for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CARD, NOTES = "README.md", "moestro.json"
LICENCE = ("license", "license_name", "license_link", "language", "extra_gated_prompt", "extra_gated_fields")
"""What a source's card says about its use and what stays true of what is made from it."""


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty where there is none."""
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        stated = yaml.safe_load(text[4 : text.index("\n---", 4)])
    except yaml.YAMLError:
        return {}
    return stated if isinstance(stated, dict) else {}


def base_model(name: str, source: Path | None) -> str | None:
    """The hub's name of the model that was cut; of a directory's, what its own card calls its base. None: unknown."""
    hub = Path(name).parts
    cached = next((part for part in hub if part.startswith("models--")), None)
    if cached is not None:
        return cached.removeprefix("models--").replace("--", "/")
    if len(hub) == 2 and hub[0] not in ("/", ".", "..", "~") and not Path(name).exists():
        return name
    stated = front_matter(source / CARD).get("base_model") if source is not None else None
    return stated if isinstance(stated, str) else None


def write_card(directory: Path, fit: Mapping[str, Any] | None = None) -> None:
    """Write (or write again) the card of a saved checkpoint from its moestro.json.

    fit: the report of a fit as plain data (`FitReport.model_dump()`), for budget, task and losses.
    """
    notes = json.loads((directory / NOTES).read_text(encoding="utf-8"))
    origin = notes.get("source", {})
    named = origin.get("base_model") or origin.get("name") or "a model from memory"
    title = f"{named.rpartition('/')[2]}, cut with moestro"
    head = {
        **({"base_model": origin["base_model"]} if origin.get("base_model") else {}),
        "library_name": "transformers",
        **({"pipeline_tag": "text-generation"} if notes["class"].endswith("ForCausalLM") else {}),
        "tags": ["mixture-of-experts", "pruned", "moestro"],
        **origin.get("card", {}),
    }
    sections = [_what(notes, named), *([_fit(fit)] if fit is not None else []), _loading(notes)]
    text = f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n# {title}\n\n"
    (directory / CARD).write_text(text + "\n\n".join(sections) + "\n", encoding="utf-8")


def _what(notes: Mapping[str, Any], named: str) -> str:
    lines = ["## What was done", "", f"- Base model: {named}", f"- Class: `{notes['class']}`, {notes['stored']}"]
    counts = notes["experts"]
    if counts:
        kept = sorted({count for count, _ in counts.values()})
        before = sorted({count for _, count in counts.values()})
        lines.append(
            f"- Experts: {_numbers(kept)} in each of {len(counts)} layers, {_numbers(before)} before; "
            "`moestro.json` names them by their numbers in the base model"
        )
    for step in notes.get("recipe", []):
        lines.append(f"- Step: `{_short(step)}`")
    for left in notes["left_out"]:
        lines.append(f"- Left out: {left}")
    return "\n".join(lines)


def _short(step: Any) -> str:
    """A step of the recipe in one line; lists of experts are in moestro.json."""
    if not isinstance(step, Mapping):
        return str(step)
    told = {k: v for k, v in step.items() if not isinstance(v, Mapping | list) or len(str(v)) < 60}
    return json.dumps(told, ensure_ascii=False, default=str)


def _numbers(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _fit(fit: Mapping[str, Any]) -> str:
    task = ", ".join(loss["domain"] for loss in fit["losses"] if loss["task"])
    lines = [
        "## What it cost",
        "",
        f"- Task: {task}",
        f"- Budget: {fit['request']}; experts were chosen by `{fit['saliency']}`",
        f"- Size of the weights: {fit['before']['bytes']:,} bytes before, {fit['after']['bytes']:,} after",
        "",
        "Held-out loss, in nats per token:",
        "",
        "| domain | tokens | before | after |",
        "|---|---|---|---|",
    ]
    for loss in fit["losses"]:
        name = f"**{loss['domain']}**" if loss["task"] else loss["domain"]
        lines.append(f"| {name} | {loss['tokens']:,} | {loss['before']:.3f} | {loss['after']:.3f} |")
    return "\n".join(lines)


def _loading(notes: Mapping[str, Any]) -> str:
    return f"""## How to load it

It is a plain checkpoint of its family and needs no moestro.

```python
from transformers import AutoTokenizer, {notes["class"]}

model = {notes["class"]}.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

```
vllm serve PATH
```"""
