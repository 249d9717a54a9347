"""Runs of the league: one row per (entry, task, seed) in a Parquet file, written whole after every run.

A second call reads the file and does what is missing. Rows that were got with other settings are never mixed: such a
file is refused, with what differs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import nn

from moestro.evidence.league import measure
from moestro.evidence.league.entries import ENTRIES, MEASURES, SIZE
from moestro.evidence.league.tasks import TASKS, Task
from moestro.evidence.records import PACKAGE, RESULTS, fingerprint, machine
from moestro.evidence.training import Trained, train_lm
from moestro.models.lm import MoELMConfig, MoELMForCausalLM

TOLERANCE = 0.01
"""How far an entry's active parameters may be from those of the model that SIZE describes, as a share."""
CODE = (
    "routing.py",
    "layers/moe.py",
    "layers/losses.py",
    "models/lm.py",
    "data/rules.py",
    "evidence/training.py",
    "evidence/league/tasks.py",
    "evidence/league/measure.py",
)
"""What every entry's row depends on, beside the files of its own parts."""

SCHEMA: dict[str, Any] = {
    "entry": pl.String,
    "task": pl.String,
    "seed": pl.Int64,
    "loss": pl.Float64,  # held out, nats per scored token, mean over domains
    "loss_by_domain": pl.String,  # JSON
    "train_loss": pl.Float64,  # mean of the last tenth of the steps
    "violation": pl.Float64,
    "entropy": pl.Float64,
    "information": pl.Float64,  # bits
    "slots": pl.Float64,  # used per token and router, held out
    "training_slots": pl.Float64,  # the same in training, mean over all steps
    "active": pl.Float64,  # parameters per token, without embeddings and routers
    "used": pl.Float64,  # the same, with the slots that were used in training or held out, whatever is more
    "router": pl.Int64,  # parameters of all routers
    "total": pl.Int64,
    "router_share": pl.Float64,  # of a forward pass's time
    "training_rate": pl.Float64,  # tokens per second
    "inference_rate": pl.Float64,
    "extra": pl.String,  # JSON: what MEASURES gave
    "note": pl.String,
    "config": pl.String,  # JSON: the entry's changes
    "settings": pl.String,  # JSON: what all rows have in common
    "code": pl.String,
    "machine": pl.String,
    "seconds": pl.Float64,
    "date": pl.String,
}
KEY = ["entry", "task", "seed"]


@dataclass(frozen=True)
class Settings:
    """What all rows of a table have in common."""

    steps: int = 400
    tokens: int = 1024
    """Of a training step, at most: as many whole rows as fit."""
    rate: float = 3e-3
    heldout_rows: int = 16
    """Of each domain."""
    size: dict[str, Any] = field(default_factory=lambda: dict(SIZE))

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: a run has at least 1")

    @property
    def warmup(self) -> int:
        return max(1, self.steps // 10)


QUICK = Settings(steps=30, tokens=512, heldout_rows=4)


@dataclass(frozen=True)
class Run:
    entry: str
    task: str
    seed: int


# ------------------------------------------------------------------------------------------------ who takes part


def chosen(names: Sequence[str] | None, table: Mapping[str, Any], what: str) -> list[str]:
    """The names, or all of the table. Raises ValueError that lists what is known."""
    for name in names or ():
        if name not in table:
            raise ValueError(f"no {what} {name!r}; there are: {', '.join(table)}")
    return list(dict.fromkeys(names)) if names else list(table)


def build(entry: str, settings: Settings, task: Task | None = None, *, seed: int = 0) -> MoELMForCausalLM:
    """The entry's untrained model."""
    vocabulary = {"vocab_size": 64} if task is None else {"vocab_size": vocab_size(task)}
    torch.manual_seed(seed)
    return MoELMForCausalLM(MoELMConfig(**{**settings.size, **vocabulary, **ENTRIES[entry]}))


def vocab_size(task: Task) -> int:
    return max(int(task.data.ids.max()), int(task.heldout.ids.max())) + 1


def budgets(entries: Iterable[str], settings: Settings) -> dict[str, measure.Parameters]:
    """Parameters of every entry. Raises ValueError naming those whose active parameters differ by over TOLERANCE."""
    counted = {name: measure.parameters(build(name, settings)) for name in entries}
    reference = measure.parameters(MoELMForCausalLM(MoELMConfig(**{**settings.size, "vocab_size": 64}))).active
    wrong = {n: p.active for n, p in counted.items() if abs(p.active / reference - 1) > TOLERANCE}
    if wrong:
        told = ", ".join(f"{name} {active:,.0f} ({active / reference - 1:+.1%})" for name, active in wrong.items())
        raise ValueError(
            f"active parameters must be within {TOLERANCE:.0%} of {reference:,.0f}, routers and embeddings left out; "
            f"not so: {told}. Change their widths or numbers of experts in ENTRIES, or leave them out with --only"
        )
    return counted


# ------------------------------------------------------------------------------------------------ the table


def read(path: Path) -> pl.DataFrame:
    """The rows that are there; none where there is no file. Raises ValueError for a file of another kind."""
    if not path.is_file():
        return pl.DataFrame(schema=SCHEMA)
    table = pl.read_parquet(path)
    if table.columns != list(SCHEMA):
        raise ValueError(f"{path} is no table of this version's league; choose another with --out")
    return table


def write(table: pl.DataFrame, path: Path) -> None:
    """All rows, in the order of entries, tasks and seeds as they were first run; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        table.write_parquet(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def recorded(quick: bool) -> Path:
    """Where the package keeps its own league."""
    return RESULTS / ("league-quick.parquet" if quick else "league.parquet")


def go_on_from(known: Path, path: Path, settings: Settings) -> None:
    """Begin a table that is not there yet with the rows of a `known` one, if that has the same settings."""
    if path.exists() or not known.is_file():
        return
    table = read(known)
    try:
        check_same(table, settings, known)
    except ValueError:
        return
    write(table, path)


def check_same(table: pl.DataFrame, settings: Settings, path: Path) -> None:
    """Raises ValueError, with what differs, where rows were got with other settings or another config of an entry."""
    now = json.loads(_json(asdict(settings)))
    for text in table["settings"].unique(maintain_order=True):
        if differences := _differences(json.loads(text), now):
            raise ValueError(f"{path} has rows with {differences}; choose another file with --out")
    for entry, text in table.select("entry", "config").unique(maintain_order=True).iter_rows():
        if entry in ENTRIES and (found := _differences(json.loads(text), json.loads(_json(ENTRIES[entry])))):
            raise ValueError(
                f"{path} has rows of {entry!r} with {found}; run them again with --again {entry}, or choose another "
                "file with --out"
            )


def _differences(there: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    """`steps=400 where it is 300 now, ...`, of nested mappings too; empty where they are the same."""
    told: list[str] = []
    for name in dict.fromkeys([*there, *now]):
        old, new = there.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            told += filter(None, [_differences(old, new, f"{prefix}{name}.")])
        elif old != new:
            told.append(f"{prefix}{name}={old!r} where it is {new!r} now")
    return ", ".join(told)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def code_of(model: nn.Module, entry: str) -> str:
    """Fingerprint of what the entry's row depends on: CODE, the files of the model's own parts, its MEASURES."""
    kinds = {type(module) for module in model.modules()} | {type(r) for r in measure.routers_of(model)}
    own = [kind for kind in kinds if kind.__module__.split(".")[0] not in ("torch", "transformers")]
    parts: list[Any] = [*own, *filter(inspect.isfunction, [MEASURES.get(entry)])]
    files = {PACKAGE / name for name in CODE} | {Path(f) for part in parts if (f := inspect.getsourcefile(part))}
    text = " ".join([entry, *sorted(fingerprint(file) for file in files)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def outdated(table: pl.DataFrame, settings: Settings) -> list[str]:
    """Entries with rows that are older than their code."""
    rows = table.select("entry", "code").unique(maintain_order=True).iter_rows()
    return list(dict.fromkeys(e for e, code in rows if e in ENTRIES and code_of(build(e, settings), e) != code))


# ------------------------------------------------------------------------------------------------ running


def play(
    path: Path,
    *,
    settings: Settings,
    entries: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    seeds: int = 3,
    again: Sequence[str] = (),
    on_start: Callable[[Run, int, int], None] = lambda *_: None,
    on_step: Callable[[int], None] = lambda _: None,
    on_done: Callable[[Run, dict[str, Any]], None] = lambda *_: None,
    on_failure: Callable[[Run, Exception], None] | None = None,
) -> pl.DataFrame:
    """Do the runs that `path` does not have, first all of seed 0; returns the whole table.

    A run whose loss becomes infinite is a row: its loss is inf. A run that fails otherwise is handed to `on_failure`,
    and the next one starts; without `on_failure` the exception goes on.

    Raises ValueError for unknown names, unequal active parameters, or a file of other settings: before any run.
    """
    names, courses = chosen(entries, ENTRIES, "entry"), chosen(tasks, TASKS, "task")
    chosen(again, ENTRIES, "entry")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: a league has at least 1")
    table = read(path).filter(~pl.col("entry").is_in(list(again)))
    check_same(table, settings, path)
    budgets(names, settings)
    have = {Run(*row) for row in table.select(KEY).iter_rows()}
    wanted = [Run(e, t, s) for s in range(seeds) for t in courses for e in names]
    missing = [run for run in wanted if run not in have]
    for number, run in enumerate(missing):
        on_start(run, number, len(missing))
        try:
            row = result(run, settings, on_step)
        except Exception as e:
            if on_failure is None:
                raise
            on_failure(run, e)
            continue
        fresh = pl.DataFrame([row], schema=SCHEMA)
        table = pl.concat([table, fresh])
        write(table, path)
        on_done(run, row)
    return table


def result(run: Run, settings: Settings, on_step: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Train the entry's model and measure it: one row of the table."""
    start = time.perf_counter()
    task = TASKS[run.task]().first(settings.heldout_rows)
    rows = max(1, settings.tokens // task.data.ids.shape[1])
    model = build(run.entry, settings, task, seed=run.seed)
    code = code_of(model, run.entry)
    size = measure.parameters(model)
    stamps = [time.perf_counter()]
    note = None
    trained: Trained | None = None

    def stamp(step: int, _: Any) -> None:
        stamps.append(time.perf_counter())
        on_step(step)

    with measure.counted(measure.routers_of(model)) as used:
        try:
            trained = train_lm(
                seed=run.seed,
                model=model,
                steps=settings.steps,
                batch_rows=rows,
                rate=settings.rate,
                warmup=settings.warmup,
                data=task.data,
                heldout=task.first(1).heldout,
                on_step=stamp,
                progress=False,
            )
        except FloatingPointError as e:
            note = str(e)
    row: dict[str, Any] = dict.fromkeys(SCHEMA)
    row |= asdict(run)
    row |= dict(loss=float("inf"), note=note, active=size.active, router=size.router, total=size.total)
    row |= dict(config=_json(ENTRIES[run.entry]), settings=_json(asdict(settings)), code=code, machine=machine())
    steps = [after - before for before, after in pairwise(stamps)]
    if steps:
        row["training_rate"] = rows * task.data.ids.shape[1] / statistics.median(steps)
    if trained is not None:
        losses = measure.heldout_loss(model, task)
        balance = measure.balance(*measure.slots_by_domain(model, task))
        row |= dict(loss=statistics.fmean(losses.values()), loss_by_domain=_json(losses), **balance)
        row["train_loss"] = statistics.fmean(trained.losses[-max(1, settings.steps // 10) :])
        row["training_slots"] = statistics.fmean(used) if used else None
        more = max(row["slots"], row["training_slots"]) - size.top_k if used else 0.0
        row["used"] = size.active + max(more, 0.0) * size.slot
        row |= measure.speed(model, task)
        row["extra"] = _json(MEASURES[run.entry](model, task)) if run.entry in MEASURES else None
    row |= dict(seconds=time.perf_counter() - start, date=f"{datetime.now(UTC):%Y-%m-%d %H:%M}")
    return row
