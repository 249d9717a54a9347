"""`moestro look`: what the experts of a model do with your texts, seen in one pass, written as one page.

Steps: open the model; read and tokenise the texts; run the model once with all observers; conclude, every finding
beside its control; write look.html, the tables behind its figures as Parquet, and the routing profile for runtimes.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Collection
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moestro.data import TokenBatches, limit_tokens, load_texts, places_of, token_batches
from moestro.directories import complete_directory, public_name
from moestro.fitting.pipeline import MAX_LENGTH, model_directories, open_model
from moestro.looking.collect import Collected, collect
from moestro.looking.depth import depth_section
from moestro.looking.divergence import divergence_section
from moestro.looking.domains import specialisation_section
from moestro.looking.heads import heads_section
from moestro.looking.load import load_section, load_table, profile_section
from moestro.looking.locality import locality_section
from moestro.looking.outliers import outliers_section
from moestro.looking.pairs import pairs_section
from moestro.looking.result import LookReport, Section
from moestro.report import write_look_page
from moestro.view.observe import progress_bar

DEFAULT_MODEL = "quartet"
DEFAULT_DATA = ("embedded",)
PAGE = "look.html"
BATCH_TOKENS = 8192
REFERENCES = ("english", "en", "ui-en")
"""Domains that other languages are compared with where none is named, first of these; else the one of most tokens."""

SECTIONS: tuple[Callable[[Collected], Section], ...] = (
    load_section,
    specialisation_section,
    divergence_section,
    pairs_section,
    locality_section,
    depth_section,
    outliers_section,
)
"""What the one pass tells; the retrieval heads, which need a pass of their own, and the routing profile follow."""


def look(
    model: Any = DEFAULT_MODEL,
    data: Any = DEFAULT_DATA,
    *,
    reference: str | None = None,
    tokens: int = 10_000,
    max_length: int | None = None,
    layers: Collection[int] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    stream: bool = False,
    tokenizer: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> LookReport:
    """See what the experts of a model do with texts of some domains.

    Args:
        model: a checkpoint directory, a hub name, a bundled model's name, a transformers model or an open view.
        data: files, folders, LABEL=FILE, embedded domains, lists of texts (see moestro.data.load_texts); labels are
            domains: topics, languages or tasks.
        reference: the domain whose routing the others' is compared with.
        tokens: to look at, per domain; drawn at random where there are more.
        layers: decoder layers to look at; all by default.
        out: directory for look.html, the tables and the routing profile; without it nothing is written.
        stream: run the model layer by layer from its directory, for checkpoints larger than memory.

    Raises:
        ValueError: a dense model, unusable data, an unknown reference or layer, an empty string for a path, `out` that
            is, holds or lies in what model or data are read from; before the model runs.
        FileExistsError: `out` exists and `overwrite` is off, or it holds something else than a look.
    """
    with ExitStack() as cleanup:
        half = None
        if out is not None:
            apart = [*model_directories(model), *places_of(data)]
            place = complete_directory(out, overwrite=overwrite, known_by=PAGE, kind="a look", apart_from=apart)
            half = cleanup.enter_context(place)
        view = open_model(model, tokenizer=tokenizer, stream=stream)
        chosen = check_layers(view, layers)
        batches = read_data(view, data, tokens=tokens, max_length=max_length, seed=seed)
        against = check_reference(batches, reference)
        seen = collect(view, batches, reference=against, layers=chosen, seed=seed, progress=progress)
        report = conclude(model, seen, progress=progress)
        if half is not None:
            write(report, seen, half)
    return report


def read_data(view: Any, data: Any, *, tokens: int, max_length: int | None, seed: int) -> TokenBatches:
    """Load and tokenise the texts, `tokens` of each domain at most.

    Raises ValueError where there is no tokenizer, or no usable text.
    """
    if view.tokenizer is None:
        raise ValueError("this model came without a tokenizer; pass tokenizer= to read texts for it")
    documents = [
        d for source in (data if isinstance(data, list | tuple) else [data]) for d in load_texts(source, split="all")
    ]
    context = getattr(view.model.config.get_text_config(), "max_position_embeddings", None) or MAX_LENGTH
    length = min(max_length or MAX_LENGTH, context)
    size = max(BATCH_TOKENS, length)
    batches = token_batches(documents, view.tokenizer, max_length=length, max_tokens_per_batch=size)
    return limit_tokens(batches, tokens, seed=seed)


def check_layers(view: Any, layers: Collection[int] | None) -> list[int]:
    """The decoder layers to look at. Raises ValueError for one without experts."""
    present = [layer.index for layer in view.layers]
    if layers is None:
        return present
    if unknown := sorted(set(layers) - set(present)):
        raise ValueError(f"decoder layer {unknown[0]} has no experts; those with experts are {present}")
    if not layers:
        raise ValueError(f"no layer to look at; those with experts are {present}")
    return sorted(set(layers))


def check_reference(batches: TokenBatches, reference: str | None) -> str:
    """The reference domain. Raises ValueError for one that the texts do not have."""
    counts = {name: n for name, n in batches.tokens_by_domain.items() if n}
    if reference is None:
        return next((name for name in REFERENCES if name in counts), max(counts, key=lambda name: counts[name]))
    if reference not in counts:
        raise ValueError(f"no text of the reference {reference!r}; the domains are: {', '.join(counts)}")
    return reference


def conclude(model: Any, seen: Collected, *, progress: bool = True) -> LookReport:
    """What was collected, as sections."""
    view, profiles = seen.view, seen.profiles
    with progress_bar(progress) as bar:
        sections = [section(seen) for section in bar.track(SECTIONS, description="concluding")]
    sections += [heads_section(seen, progress=progress), profile_section(seen)]
    path = model if isinstance(model, str | Path) else getattr(view.model.config, "_name_or_path", "")
    return LookReport(
        model=public_name(str(path)) if str(path) else type(view.model).__name__,
        layers=seen.sizes,
        top_k=tuple(sorted({layer.top_k for layer in view.layers})),
        tokens={name: n for name, n in seen.batches.tokens_by_domain.items() if n},
        texts=len(profiles),
        reference=seen.reference,
        sections=sections,
        date=datetime.now(UTC),
        versions={name: version(name) for name in ("moestro", "torch", "transformers")},
        machine=f"{platform.machine()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        seconds=seen.seconds,
        seed=seen.seed,
        warnings=thin_domains(seen),
    )


FEW_TEXTS = 10
"""Texts below which a domain's intervals are said to be rough. Our choice."""


def thin_domains(seen: Collected) -> list[str]:
    """A warning where domains have few texts."""
    counts = seen.profiles.domain.bincount(minlength=len(seen.profiles.domains)).tolist()
    thin = [f"{name} ({n})" for name, n in zip(seen.profiles.domains, counts, strict=True) if 0 < n < FEW_TEXTS]
    if not thin:
        return []
    return [f"Texts are the units of all intervals and tests; of these domains there are few: {', '.join(thin)}."]


def write(report: LookReport, seen: Collected, directory: Path) -> None:
    """The page, every figure's table as Parquet, and the routing profile as CSV and JSON."""
    for figure in report.figures:
        figure.table.write_parquet(directory / f"{figure.name}.parquet", compression="zstd")
    table = load_table(seen).select("layer", "expert", count="tokens")
    table.write_csv(directory / "routing_profile.csv")
    (directory / "routing_profile.json").write_text(json.dumps(routing_profile(report, seen)))
    write_look_page(report, directory / PAGE)


def routing_profile(report: LookReport, seen: Collected) -> dict[str, Any]:
    """Counts in the form of SGLang's expert locations: logical_count [decoder layers][experts], dense layers all 0."""
    config = seen.view.model.config.get_text_config()
    depth = max(getattr(config, "num_hidden_layers", 0), max(seen.sizes) + 1)
    width = max(seen.sizes.values())
    counts = torch.zeros(depth, width, dtype=torch.long)
    for layer, table in seen.profiles.counts.items():
        counts[layer, : table.shape[1]] = table.sum(dim=0).long()
    order = {
        str(layer): counts[layer, :size].argsort(descending=True, stable=True).tolist()
        for layer, size in seen.sizes.items()
    }
    return {
        "model": report.model,
        "tokens": sum(report.tokens.values()),
        "logical_count": counts.tolist(),
        "hottest_first": order,
    }
