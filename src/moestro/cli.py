"""The command line, `moestro --help`: what each command does is in the room of its verb."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moestro.arguments import name_argument, path_argument
from moestro.directories import check_apart, check_writable
from moestro.evidence.commands import papers, reproduce
from moestro.evidence.league_command import league
from moestro.looking.commands import look
from moestro.steer.commands import generate, steer
from moestro.studio.commands import studio
from moestro.train.commands import train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Understand, steer, shrink and save mixture-of-experts models.",
)
console, errors = Console(), Console(stderr=True)


@app.command()
def fit(
    model: Annotated[
        str, typer.Argument(parser=name_argument, help="checkpoint directory, hub name or bundled model")
    ] = "quartet",
    for_: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            parser=name_argument,
            help="the task's texts: file, folder, LABEL=FILE or embedded domain; may be repeated",
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="size of the saved checkpoint at most: 6GB, 800MiB, or 60% of the present size")
    ] = None,
    experts: Annotated[str | None, typer.Option(help="or the share of the experts to keep", show_default="50%")] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=path_argument, help="directory for checkpoint and report", show_default="MODEL-fit"),
    ] = None,
    format: Annotated[
        str, typer.Option(help="how the checkpoint is stored: hf (plain tensors), or source (quantised as MODEL is)")
    ] = "hf",
    saliency: Annotated[str, typer.Option(help="random, frequency, gating-score, reap or easy-ep")] = "easy-ep",
    rest: Annotated[
        list[str] | None,
        typer.Option(
            parser=name_argument, help="texts to watch beside the task", show_default="other embedded domains"
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="tokens to observe, per domain", min=1)] = 50_000,
    heldout_tokens: Annotated[int, typer.Option(help="tokens to measure the loss on, per domain", min=1)] = 8_000,
    max_length: Annotated[int | None, typer.Option(help="longest window of a text, in tokens", min=2)] = None,
    seed: Annotated[int, typer.Option(help="of the held-out split and the calibration draw")] = 0,
    stream: Annotated[
        bool, typer.Option("--stream", help="run the model layer by layer from disk: for one larger than memory")
    ] = False,
    work: Annotated[
        Path | None,
        typer.Option(
            parser=path_argument, help="where --stream keeps what a killed run goes on from", show_default="OUT.work"
        ),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            parser=path_argument,
            help="keep what the calibration finds here, or read it: for another budget or saliency",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and stop")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace what moestro wrote to OUT; refused where OUT holds more")
    ] = False,
    publish_samples: Annotated[
        bool, typer.Option("--publish-samples", help="write held-out prompts and continuations into the report")
    ] = False,
) -> None:
    """Cut a mixture-of-experts model to a budget for a task, and prove what it cost.

    Examples:

      moestro fit                                     the bundled model, its code domain, half the experts

      moestro fit ./OLMoE --memory 6GB --for math=problems.jsonl --out ./OLMoE-math

      moestro fit ./Qwen3-30B-A3B --experts 50% --for mails.txt --for chats.parquet --dry-run

      moestro fit ./Qwen3-235B-A22B --stream --memory 120GB --for mails.txt

      moestro fit ./OLMoE --for mails.txt --experts 50% --stats ./olmoe-stats --out ./half

      moestro fit ./OLMoE --for mails.txt --experts 25% --stats ./olmoe-stats --out ./quarter

    The Qwen3-235B is larger than memory. It is run layer by layer; if that is killed, the same command goes on. The
    last fit reads the statistics of the one before it: the model is not calibrated again.
    """
    import moestro.fitting.pipeline as pipeline
    from moestro.data import places_of
    from moestro.fitting.plan import make_plan
    from moestro.view.saving import check_format

    data = for_ or list(pipeline.DEFAULT_TASK)
    target = Path(f"{Path(model).name}-fit") if out is None else out
    if not dry_run:
        check_apart(target, [*pipeline.model_directories(model), *places_of(data), *places_of(rest)])
        check_writable(target.absolute(), overwrite=overwrite, known_by="config.json", kind="a checkpoint")
    limits: dict[str, Any] = dict(
        calibration_tokens=calibration_tokens, heldout_tokens=heldout_tokens, max_length=max_length, seed=seed
    )
    budget: dict[str, Any] = dict(memory=memory, experts=experts, format=format, saliency=saliency)
    kept = pipeline.work_directory(None if dry_run else target, work, stream)
    if dry_run:
        view = pipeline.open_model(model, stream=stream)
        check_format(format, view.source)
        texts = pipeline.read_data(view, data, rest=rest, **limits)
        places: dict[str, Any] = dict(
            work=kept and kept / "calibration", stats=stats, source=pipeline.directory_of(model), save=True
        )
        plan = make_plan(view, texts.calibration, seed=seed, **places, **budget)
        _print_plan(view, plan)
        return
    places = dict(
        out=target, overwrite=overwrite, stream=stream, work=work, stats=stats, publish_samples=publish_samples
    )
    try:
        fitted = pipeline.fit(model, data, rest=rest, **places, **budget, **limits)
    except KeyboardInterrupt:
        if kept is not None and kept.exists():
            errors.print(f"what was done so far is in {kept}: the same command goes on from there")
        raise
    if not fitted.plan.observed:
        console.print(f"statistics  {stats} served: no calibration pass", highlight=False)
    _print_report(fitted.report)
    console.print(f"\ncheckpoint  {target}\nreport      {target / 'report.html'}", highlight=False)


@app.command()
def apply(
    recipe: Annotated[
        Path, typer.Argument(parser=path_argument, help="a recipe's JSON file, or a checkpoint that moestro has cut")
    ],
    model: Annotated[
        str,
        typer.Argument(parser=name_argument, help="checkpoint directory, hub name or bundled model to do the same to"),
    ],
    out: Annotated[Path, typer.Option(parser=path_argument, help="directory for the checkpoint")],
    stream: Annotated[
        bool, typer.Option("--stream", help="layer by layer from disk: for a model larger than memory")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace what moestro wrote to OUT; refused where OUT holds more")
    ] = False,
) -> None:
    """Repeat on a sibling what was done to a model: cut the base model as its instruct version was cut.

    A checkpoint that `moestro fit` wrote carries its recipe in moestro.json: which experts stayed in which layer. The
    other model must be alike: the same architecture, layers, numbers of experts and top_k. If it is not, the difference
    is told and nothing is written. No data is needed; how good the choice is for the sibling, `moestro look` can tell.

    Examples:

      moestro fit ./OLMoE-Instruct --for mails.txt --experts 50% --out ./OLMoE-Instruct-mails

      moestro apply ./OLMoE-Instruct-mails ./OLMoE --out ./OLMoE-mails

      moestro apply recipe.json ./Qwen3-235B-A22B --stream --out ./Qwen3-half
    """
    import moestro.fitting.pipeline as pipeline
    from moestro.recipe import Recipe

    check_apart(out, [recipe, *pipeline.model_directories(model)])
    check_writable(out.absolute(), overwrite=overwrite, known_by="config.json", kind="a checkpoint")
    loaded = Recipe.load(recipe)
    if not loaded.operations:
        raise ValueError(f"{recipe} carries a recipe without operations: there is nothing to repeat")
    loaded.check_portable()
    with errors.status(f"opening {model}"):
        view = pipeline.open_model(model, stream=stream)
    before = view.num_bytes
    with errors.status("checking what the recipe asks for"):
        view.check(loaded)
    with errors.status(f"applying {', '.join(op.kind for op in loaded.operations)}"):
        view.apply(loaded)
    if stream:
        view.save(out, overwrite=overwrite)  # shows its own progress
    else:
        with errors.status(f"saving {out}"):
            view.save(out, overwrite=overwrite)
    table = Table("layer", "experts left", "top_k", title=loaded.note or None)
    for layer in view.layers:
        table.add_row(str(layer.index), str(layer.num_experts), str(layer.top_k))
    console.print(table)
    console.print(f"size        {_size(before)} -> {_size(view.num_bytes)}\ncheckpoint  {out}", highlight=False)


@app.command()
def gguf(
    checkpoint: Annotated[
        str, typer.Argument(parser=name_argument, help="saved checkpoint directory, or bundled model")
    ],
    file: Annotated[Path, typer.Argument(parser=path_argument, help="the file to write")],
    dtype: Annotated[str, typer.Option(help="f32, f16 or bf16; llama-quantize makes the others of it")] = "f16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing file")] = False,
) -> None:
    """Write a Qwen3 or Qwen3-MoE checkpoint with a tokenizer of its own as a GGUF file for llama.cpp.

    llama.cpp's converter refuses tokenizers that it does not know, as that of the bundled models; checkpoints of the
    hub's families go through the converter.
    """
    from moestro.bundled import bundled_path
    from moestro.formats.gguf import write_gguf

    source = Path(checkpoint) if Path(checkpoint).exists() else bundled_path(checkpoint) or Path(checkpoint)
    written = write_gguf(source, file, dtype=dtype, overwrite=overwrite)
    console.print(f"{written}  {_size(written.stat().st_size)}", highlight=False)


app.command()(look)
app.command()(generate)
app.add_typer(steer, name="steer")
app.command()(studio)
app.command()(papers)
app.command()(reproduce)
app.command()(train)
app.command()(league)


def _print_plan(view, plan) -> None:
    table = Table("layer", "experts", "kept", "unseen", "thin", title=f"{plan.request}, by {plan.saliency}")
    for layer in view.layers:
        count = plan.stats.layers[layer.index].count
        row = (layer.index, layer.num_experts, len(plan.keep[layer.index]), int((count == 0).sum()))
        table.add_row(*map(str, row), str(int((count < plan.coverage.needed).sum())))
    console.print(table)
    console.print(
        f"size {_size(view.num_bytes)} -> {_size(plan.bytes_after)}, of which every expert shares "
        f"{_size(plan.sizes.shared)}; {'observed' if plan.observed else 'saved statistics of'} "
        f"{sum(plan.stats.tokens.values()):,} tokens of "
        f"{', '.join(plan.stats.domains)}",
        highlight=False,
    )
    for warning in plan.warnings:
        errors.print(f"[yellow]warning:[/] {escape(warning)}")


def _print_report(report) -> None:
    table = Table("domain", "", "tokens", "before", "after", "change", title="held-out loss, nats per token")
    for loss in report.losses:
        cells = (f"{loss.tokens:,}", f"{loss.before:.3f}", f"{loss.after:.3f}", f"{loss.after - loss.before:+.3f}")
        table.add_row(loss.domain, "task" if loss.task else "", *cells, style="bold" if loss.task else "dim")
    console.print(table)
    costs = Table("", "before", "after")
    costs.add_row("size", _size(report.before.bytes), _size(report.after.bytes))
    if report.before.load_seconds is not None and report.after.load_seconds is not None:
        costs.add_row("load time", f"{report.before.load_seconds:.2f} s", f"{report.after.load_seconds:.2f} s")
    if report.before.tokens_per_second is not None and report.after.tokens_per_second is not None:
        speeds = (f"{c.tokens_per_second:.1f} tokens/s" for c in (report.before, report.after))
        costs.add_row("generation", *speeds)
    console.print(costs)
    if report.streamed:
        console.print("streamed from disk: no samples, speed or load time, since generating would take too long")
    for warning in report.warnings:
        errors.print(f"[yellow]warning:[/] {escape(warning)}")


def _size(number: int) -> str:
    value = float(number)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def main() -> None:
    """Run the command line; errors that a user can mend are told in one line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        import transformers

        transformers.utils.logging.disable_progress_bar()
    warnings.showwarning = lambda message, *_args, **_kw: errors.print(f"[yellow]warning:[/] {escape(str(message))}")
    terminated: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        terminated.append(number)
        raise KeyboardInterrupt  # the same clean-up as after Ctrl-C

    signal.signal(signal.SIGTERM, stop)
    try:
        app()
    except SystemExit as e:
        if e.code == 130:  # what typer makes of Ctrl-C
            errors.print("stopped; nothing half-written is left behind")
            if terminated:
                sys.exit(128 + signal.SIGTERM)
        raise
    except (ValueError, OSError, ImportError, FloatingPointError) as e:
        if os.environ.get("MOESTRO_TRACEBACK"):
            raise
        errors.print(f"[red]error:[/] {escape(str(e))}", soft_wrap=True)
        sys.exit(1)
