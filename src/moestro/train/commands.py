"""`moestro train`: a language model from a YAML file."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moestro.arguments import path_argument

console, errors = Console(), Console(stderr=True)
WARM_UP, TIMED = 1, 2
"""Steps of a dry run."""


def train(
    config: Annotated[Path, typer.Argument(parser=path_argument, help="YAML file: model, tokenizer, data, plan")],
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path_argument,
            help="directory of the run; one that holds the same run goes on, any other is left alone",
            show_default="runs/FILE",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show sizes, tokens and the estimated time, and stop")
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's own choice", min=0)] = 0,
) -> None:
    """Train a mixture-of-experts language model from a YAML file, or go on with a run that was stopped.

    The file names the model's parts (sizes, router, experts, ...), the data and the plan; examples/train-small.yaml
    is a documented one that takes about two minutes:

      name: small
      model:
        hidden_size: 128
        num_hidden_layers: 4
        num_experts: 16
        num_experts_per_tok: 2
        router: top_k                 # or sigmoid, expert_choice, hash, ...; {kind: sigmoid, bias_rate: 0.001}
        router_losses: {load_balance: 0.01}
      data:
        sources: embedded             # or a list: files, folders, LABEL=FILE, embedded domains
        row: 128
      plan: {tokens: 600_000, precision: bf16}

    The directory gets checkpoint.pt (written again and again: stop or kill the run and give the same command to go
    on), metrics.jsonl, TensorBoard files where tensorboardX is installed, and at the end report.html and model/, which
    AutoModelForCausalLM.from_pretrained loads (after `import moestro`).

    Your texts are in data/ as tokens, and the paths in your YAML file are in train.yaml, moestro-run.json and data/:
    keep those to yourself. model/ and report.html hold neither, only the names of the domains.

    Examples:

      moestro train examples/train-small.yaml --dry-run

      moestro train examples/train-small.yaml --out runs/small

      accelerate launch --cpu --num_processes 2 $(which moestro) train my.yaml --out runs/mine
    """
    import torch

    from moestro.directories import lock
    from moestro.formats.companions import write_tokenizer
    from moestro.train import config as reading
    from moestro.train.processes import join
    from moestro.train.run_folder import check_folder
    from moestro.train.trainer import REPORT, Trainer

    if threads:
        torch.set_num_threads(threads)
    chosen = reading.read_config(config)
    plan = chosen.plan_for(chosen.data.row)
    folder = Path("runs") / config.stem if out is None else out
    made_of = reading.made_of(chosen, plan.seed)
    processes = join()
    if not dry_run and processes.rank == 0:
        check_folder(folder, made_of, reading.places_read(chosen))
    tokenizer = reading.tokenizer_of(chosen)
    model = reading.model_of(chosen, tokenizer, plan.seed)
    if torch.cuda.is_available():
        model = model.cuda()
    if dry_run:
        _print_sizes(model, *reading.rows_of(chosen, tokenizer, plan.seed), plan)
        return
    with lock(folder) if processes.rank == 0 else nullcontext():
        if processes.rank == 0:
            check_folder(folder, made_of)  # it may have changed meanwhile
        rows, heldout = _rows(chosen, tokenizer, plan, folder, made_of)
        trainer = Trainer(model, rows, plan, folder, heldout=heldout, name=chosen.name)
        if processes.rank == 0:
            if trainer.step:
                console.print(f"going on at step {trainer.step:,} of {plan.steps:,}", highlight=False)
            _keep_config(config, folder)
        try:
            trainer.run()
        except KeyboardInterrupt:
            if processes.rank == 0:
                errors.print(_stopped(trainer), highlight=False, soft_wrap=True)
            raise
        if processes.rank == 0:
            write_tokenizer(tokenizer, folder / "model")
    if processes.rank == 0:
        console.print(f"model   {folder / 'model'}\nreport  {folder / REPORT}", highlight=False)


def _keep_config(config: Path, folder: Path) -> None:
    """A copy of the file in the run's folder; its text was read before, so it may be that copy."""
    text, copy = config.read_text(encoding="utf-8"), folder / "train.yaml"
    if not copy.is_file() or copy.read_text(encoding="utf-8") != text:
        copy.write_text(text, encoding="utf-8")


def _stopped(trainer: Any) -> str:
    saved = trainer.saved_step
    goes_on = f"goes on at step {saved:,}" if saved else "starts at the beginning: no checkpoint was written yet"
    return f"stopped at step {trainer.step:,} of {trainer.plan.steps:,}; the same command {goes_on}"


def _rows(chosen: Any, tokenizer: Any, plan: Any, folder: Path, made_of: dict[str, Any]) -> tuple[Any, Any]:
    """(training, held-out) rows, memory-mapped from the run's folder; packed on first use, by process 0."""
    from moestro.train.config import rows_of
    from moestro.train.packing import read_rows, write_rows
    from moestro.train.processes import join
    from moestro.train.run_folder import mark

    processes = join()
    parts = tuple(folder / "data" / split for split in ("train", "heldout"))
    stamp, now = folder / "data" / "made_of.json", json.dumps(made_of)
    if processes.rank == 0 and not (stamp.exists() and stamp.read_text() == now):
        packed = rows_of(chosen, tokenizer, plan.seed)  # before anything is written: they may be refused
        mark(folder, made_of)
        stamp.unlink(missing_ok=True)
        for part, rows in zip(parts, packed):
            part.mkdir(parents=True, exist_ok=True)
            write_rows(part, "rows", rows)
        stamp.write_text(now)
    processes.wait()
    return read_rows(parts[0], "rows"), read_rows(parts[1], "rows")


def _print_sizes(model: Any, rows: Any, heldout: Any, plan: Any) -> None:
    from moestro.train.config import parameter_counts

    total, active = parameter_counts(model)
    tokens = plan.steps * plan.batch_rows * rows.length
    table = Table(show_header=False)
    table.add_row("parameters", f"{total:,} in all, {active:,} active per token")
    held = len(rows) * rows.length
    table.add_row(
        "data",
        f"{held:,} tokens in {len(rows):,} rows of {rows.length}, {len(rows.domains)} domains; "
        f"{len(heldout):,} held-out rows",
    )
    table.add_row("training", f"{tokens:,} tokens in {plan.steps:,} steps: {tokens / held:.1f} passes over the data")
    seconds = _seconds_per_step(model, rows, plan)
    table.add_row("estimated time", f"{_duration(seconds * plan.steps)} ({seconds:.2f} s a step, {TIMED} steps timed)")
    console.print(table, highlight=False)


def _seconds_per_step(model: Any, rows: Any, plan: Any) -> float:
    """Measured on real steps of a run that is thrown away."""
    import tempfile

    from moestro.train.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, rows, plan, Path(folder), progress=False)
        seconds = []
        for _ in range(min(WARM_UP + TIMED, plan.steps)):
            since = time.monotonic()
            trainer.train_step()
            seconds.append(time.monotonic() - since)
    timed = seconds[WARM_UP:] or seconds
    return sum(timed) / len(timed)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
