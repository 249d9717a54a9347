"""`moestro.fit`: a mixture-of-experts model, a task and a budget in; a checkpoint that fits and a report out.

Steps: read the task's texts and hold a part out; observe the rest; score and choose; measure the whole model on the
held-out part; cut; save; load what was saved; measure again; write the report. Nothing is chosen after the held-out
part was read.
"""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import moestro.view.open as opening
from moestro.bundled import bundled_path
from moestro.data import (
    Document,
    TokenBatches,
    embedded,
    embedded_domains,
    limit_tokens,
    load_texts,
    places_of,
    split_heldout,
    token_batches,
)
from moestro.directories import check_apart, complete_directory, public_name, some_path
from moestro.fitting.evaluate import HeldoutLoss, batch_tokens, check_heldout, continuations, tokens_per_second
from moestro.fitting.memory import check_fits
from moestro.fitting.plan import Plan, make_plan
from moestro.fitting.result import Cost, DomainLoss, FitReport, LayerChoice, Sample
from moestro.fitting.work import Work
from moestro.formats.card import write_card
from moestro.recipe import annotate
from moestro.report import write_fit_page
from moestro.view.checkpoint import source_directories
from moestro.view.observe import ExpertCounts
from moestro.view.saving import check_format

DEFAULT_MODEL = "quartet"
DEFAULT_TASK = ("embedded:code",)
MAX_LENGTH = 2048
PROMPT_WORDS, SAMPLES = 12, 4


@dataclass
class Fitted:
    """The result of a fit: the small model, what was decided, and what it cost."""

    view: Any
    plan: Plan
    report: FitReport
    path: Path | None


@dataclass(frozen=True)
class FitData:
    """The task's texts, split, and the texts that show what else changes."""

    calibration: TokenBatches
    heldout: TokenBatches
    heldout_texts: list[Document]
    task: tuple[str, ...]


def read_data(
    view: Any,
    data: Any,
    *,
    rest: Any = None,
    calibration_tokens: int = 50_000,
    heldout_tokens: int = 8_000,
    max_length: int | None = None,
    seed: int = 0,
) -> FitData:
    """Load the task's texts (`data`: see load_texts) and those of `rest`, and split them.

    `rest=None`: the embedded sample's other domains; `rest=()`: none. Limits are per domain.

    Raises ValueError where there is no tokenizer, no usable text, or no text left for one of the parts.
    """
    if view.tokenizer is None:
        raise ValueError("this model came without a tokenizer; pass tokenizer= to read texts for it")
    sources = list(data) if isinstance(data, list | tuple) else [data]
    documents = [d for source in sources for d in load_texts(source, split="all")]
    calibration, heldout = split_heldout(documents, seed=seed)
    task = tuple(dict.fromkeys(d.domain for d in documents))
    if rest is None:
        others = [name for name in embedded_domains() if name not in task]
        heldout = [*heldout, *(embedded(others, "heldout") if others else [])]
    else:
        for source in rest if isinstance(rest, list | tuple) else [rest]:
            heldout += [d for d in load_texts(source, split="all") if d.domain not in task]
    context = getattr(view.model.config.get_text_config(), "max_position_embeddings", None) or MAX_LENGTH
    length = min(max_length or MAX_LENGTH, context)
    tokens = max(batch_tokens(view.model.config), length)
    batches = [
        limit_tokens(
            token_batches(part, view.tokenizer, max_length=length, max_tokens_per_batch=tokens), limit, seed=seed
        )
        for part, limit in ((calibration, calibration_tokens), (heldout, heldout_tokens))
    ]
    if missing := [name for name in task if not batches[0].tokens_by_domain.get(name)]:
        raise ValueError(f"the calibration part of {missing[0]!r} has no token; give it more texts")
    check_heldout(batches[1], task)
    return FitData(batches[0], batches[1], heldout, task)


def open_model(model: Any, *, tokenizer: Any = None, stream: bool = False) -> Any:
    """The view to fit, of whatever `fit` takes as a model.

    Raises ValueError where a checkpoint is larger than memory and not to be streamed.
    """
    if isinstance(model, opening.ExpertView):
        if stream and not model.streamed:
            raise ValueError("stream=True fits a checkpoint directory; this model is in memory already")
        return model
    path = directory_of(model)
    if path is not None and not stream:
        check_fits(path)
    return opening.open(model, tokenizer=tokenizer, stream=stream)


def fit(
    model: Any = DEFAULT_MODEL,
    data: Any = DEFAULT_TASK,
    *,
    memory: str | None = None,
    experts: str | None = None,
    saliency: str = "easy-ep",
    rest: Any = None,
    out: str | Path | None = None,
    format: str = "hf",
    overwrite: bool = False,
    stream: bool = False,
    work: str | Path | None = None,
    stats: str | Path | None = None,
    protect: Collection[tuple[int, int]] = (),
    publish_samples: bool = False,
    calibration_tokens: int = 50_000,
    heldout_tokens: int = 8_000,
    max_length: int | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Fitted:
    """Cut a mixture-of-experts model to a budget for a task.

    Args:
        model: a checkpoint directory, a hub name, a bundled model's name, a transformers model (changed in place) or
            an open view.
        data: texts of the task: files, folders, embedded domains, lists of texts (see moestro.data.load_texts).
        memory: size of the saved checkpoint at most, shared parts counted: "6GB", or a share of the size of the
            checkpoint that is there.
        experts: or the share of the experts to keep: "50%" (the default where neither is given).
        saliency: how experts are scored; a name in moestro.compress.prune.saliency.SALIENCIES.
        rest: texts that show what the cut costs elsewhere; by default the embedded sample's other domains.
        out: directory for the checkpoint, report.html and report.json; without it nothing is saved, and the model
            that is measured is the one in memory.
        format: how the checkpoint is stored: "hf" (plain) or "source" (quantised as the one it was made from).
        stream: run the model layer by layer from its directory, for checkpoints larger than memory. Nothing is
            generated then: the report has no samples, speed or load time.
        work: where a streamed fit keeps what a killed one goes on from when it is called again with the same arguments;
            by default `out` with `.work` behind it, deleted when the fit is done. A directory named here stays.
        stats: a directory for what the calibration finds (sums per expert, no text). A later fit of the same model on
            the same data, to another budget or by another saliency that these statistics can serve, is not calibrated
            again. They are saved beside the report in `out` too, which can be named here as well.
        protect: (decoder layer, expert) pairs that are never dropped.
        publish_samples: write held-out prompts and their continuations into report.json and report.html, which lie
            beside the checkpoint. Otherwise no text of the user is in any file; `Fitted.report` has them either way.
        calibration_tokens, heldout_tokens: limits per domain.

    Raises:
        ValueError: a dense model, an impossible budget, a cut or checkpoint that cannot be made (see
            `ExpertView.check`), unusable data, a checkpoint larger than memory without `stream`, `stats` of another
            model or data, an empty string for a path, `out`, `work` or `stats` that is, holds or lies in what model or
            data are read from; before anything is observed, changed or written. Or `work` belongs to another fit.
        FileExistsError: `out` exists and `overwrite` is off, or holds files that moestro did not write.
        BlockingIOError: another run is writing to `out` or `work`.
    """
    out = some_path(out, "out") if out is not None else None
    stats = some_path(stats, "stats") if stats is not None else None
    stream = stream or getattr(model, "streamed", False)
    sources = [*model_directories(model), *places_of(data), *places_of(rest)]
    if stats is not None:
        check_apart(stats, sources, "stats")
    kept = Work(work_directory(out, work, stream), out, sources)
    with ExitStack() as cleanup:
        cleanup.enter_context(kept.held())
        half = None
        if out is not None:
            place = kept.published if stream else complete_directory
            half = cleanup.enter_context(place(out, overwrite=overwrite, apart_from=sources))
        view = open_model(model, tokenizer=tokenizer, stream=stream)
        view.check_idle()
        if len({layer.index for layer in view.layers}) < len(view.layers):
            raise ValueError(
                "this view holds several stacks of experts, and texts say little about those that see no text: cut it "
                "by a recipe of your own, view.keep_experts({name of a block: [ids]}), or fit one stack (part=...)"
            )
        check_format(format, view.source)
        limits: dict[str, Any] = dict(
            calibration_tokens=calibration_tokens, heldout_tokens=heldout_tokens, max_length=max_length
        )
        texts = read_data(view, data, rest=rest, seed=seed, **limits)
        choice: dict[str, Any] = dict(memory=memory, experts=experts, format=format, saliency=saliency, protect=protect)
        places: dict[str, Any] = dict(
            work=kept.directory("calibration"),
            stats=stats,
            source=directory_of(model),
            save=half is not None,
        )
        plan = make_plan(view, texts.calibration, seed=seed, progress=progress, **choice, **places)
        prompts = _prompts(texts)
        before = _measure(view, texts, prompts, "before", progress, kept)
        view.apply(plan.recipe)
        kept.begin(plan.keep, save=half is not None, format=format)
        size = view.bytes_in(format)
        if half is not None:  # what is measured is what is shipped
            last = isinstance(model, str | Path)
            view = kept.saved(view, format) if stream else _written(view, half, format, last=last)
        after = _measure(view, texts, prompts, "after", progress, kept, size=size)
        report = _report(model, plan, texts, prompts, before, after, streamed=stream)
        if half is not None:
            if plan.statistics is not None:
                plan.statistics.save(half)
            annotate(half, statistics="statistics.json", note=f"{plan.request}, by {plan.saliency}")
            public = report if publish_samples else report.without_samples()
            (half / "report.json").write_text(public.model_dump_json(indent=1))
            write_fit_page(public, half / "report.html")
            write_card(half, public.model_dump())
    if stream and out is not None:
        view = opening.open(out, stream=True)  # it has moved
    if work is None:
        kept.remove()
    return Fitted(view, plan, report, out)


def directory_of(model: Any) -> Path | None:
    """The directory of a checkpoint that `fit` itself loads; None for a hub name or a model that is open already.

    Raises ValueError for an empty string.
    """
    if not isinstance(model, str | Path):
        return None
    named = some_path(model, "model")
    path = named if named.exists() else bundled_path(str(model))
    return path if path is not None and path.is_dir() else None


def work_directory(out: Path | None, work: str | Path | None, stream: bool) -> Path | None:
    """Where a streamed fit keeps its work; None where it keeps none. Raises ValueError where none is streamed."""
    if work is not None and not stream:
        raise ValueError(f"work={str(work)!r} is of use to a streamed fit alone: pass --stream (stream=True)")
    if work is None and stream and out is not None:
        return out.absolute().with_name(f"{out.name}.work")
    return some_path(work, "work") if work is not None else None


def model_directories(model: Any) -> list[Path]:
    """The directories that `model`, as `fit` takes it, is read from: none for a name on the hub."""
    if isinstance(model, str | Path):
        path = directory_of(model)
        return [] if path is None else [path]
    view_path = getattr(model, "path", None)  # of a streamed view
    return [view_path] if isinstance(view_path, Path) else source_directories(getattr(model, "model", model))


def _written(view: Any, half: Path, format: str, *, last: bool) -> Any:
    """The model in memory as it is read back from `half`. `last`: nobody else holds it, so it can be dropped."""
    view.write(half, format=format)
    if last:
        view.model.to("meta")
        gc.collect()
    return opening.open(half)


@contextmanager
def _moestro_backend(view: Any) -> Iterator[None]:
    """Run the experts on the `moestro` backend where that is the fastest: on CPU."""
    former = view.model.config._experts_implementation
    if view.device.type == "cpu":
        view.model.set_experts_implementation("moestro")
    try:
        yield
    finally:
        if view.device.type == "cpu":
            view.model.set_experts_implementation(former)


@dataclass(frozen=True)
class _Measured:
    losses: dict[str, tuple[float, int]]
    served: ExpertCounts
    texts: list[str]
    cost: Cost


def _measure(
    view: Any,
    texts: FitData,
    prompts: Sequence[tuple[str, str, str]],
    when: str,
    progress: bool,
    kept: Work,
    size: int | None = None,
) -> _Measured:
    """Losses and costs of the view's model; `size`: of its checkpoint, where that is not of the kind it came from."""
    written: list[str] = []
    speed = None
    resumable = {} if kept.path is None else {"work": kept.directory(when)}
    with _moestro_backend(view):
        losses, _ = view.observe(
            texts.heldout,
            [HeldoutLoss(), served := ExpertCounts()],
            progress=progress,
            description=f"held-out loss {when}",
            **resumable,
        )
        if not view.streamed:
            written = continuations(view.model, view.tokenizer, [prompt for _, prompt, _ in prompts])
            speed = tokens_per_second(view.model, view.tokenizer)
    cost = Cost(bytes=view.num_bytes if size is None else size, load_seconds=view.load_seconds, tokens_per_second=speed)
    return _Measured(losses, served, written, cost)


def _prompts(texts: FitData) -> list[tuple[str, str, str]]:
    """(domain, prompt, what really follows) from held-out texts: the task's domains first."""
    domains = list(dict.fromkeys([*texts.task, *(d.domain for d in texts.heldout_texts)]))
    found = []
    for domain in domains:
        for document in texts.heldout_texts:
            words = (document.text or "").split(" ")
            if document.domain == domain and len(words) > 2 * PROMPT_WORDS:
                prompt = " ".join(words[:PROMPT_WORDS])
                found.append((domain, prompt, " ".join(["", *words[PROMPT_WORDS : 4 * PROMPT_WORDS]])))
                break
        if len(found) == SAMPLES:
            break
    return found


def _name(model: Any) -> str:
    """What a model is called in a report: its name on the hub, its directory's name, else its class."""
    if not isinstance(model, str | Path):
        model = getattr(model, "model", model)
        model = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return public_name(str(model))


def _report(
    model: Any,
    plan: Plan,
    texts: FitData,
    prompts: Sequence[tuple[str, str, str]],
    before: _Measured,
    after: _Measured,
    *,
    streamed: bool,
) -> FitReport:
    name = _name(model)
    domains = sorted(before.losses, key=lambda domain: domain not in texts.task)
    served = before.served.result()
    layers = []
    for index, kept in plan.keep.items():
        slots = plan.stats.by_domain[index]
        layers.append(
            LayerChoice(
                layer=index,
                num_experts=slots.count.shape[1],
                top_k=round(float(slots.count.sum()) / sum(plan.stats.tokens.values())),
                kept=kept,
                scores=[None if s != s else s for s in plan.scores[index].tolist()],
                tokens=slots.count.long().tolist(),
                heldout_tokens=[served[index][before.served.domains.index(d)].long().tolist() for d in domains],
            )
        )
    return FitReport(
        model=name,
        request=plan.request,
        saliency=plan.saliency,
        seed=plan.seed,
        calibration={name: plan.stats.tokens[name] for name in plan.stats.domains},
        layers=layers,
        coverage=plan.coverage,
        losses=[
            DomainLoss(
                domain=d,
                task=d in texts.task,
                tokens=before.losses[d][1],
                before=before.losses[d][0],
                after=after.losses[d][0],
            )
            for d in domains
        ],
        before=before.cost,
        after=after.cost,
        samples=[
            Sample(domain=d, prompt=p, before=b, after=a, reference=r)
            for (d, p, r), b, a in zip(prompts, before.texts, after.texts)
        ],
        streamed=streamed,
        warnings=plan.warnings,
        date=datetime.now(UTC),
        versions={name: version(name) for name in ("moestro", "torch", "transformers")},
        machine=f"{platform.machine()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
    )
