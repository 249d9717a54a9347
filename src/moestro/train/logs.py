"""What a run says while it trains: metrics.jsonl always, TensorBoard files where tensorboardX is, and the terminal.

A record is {"step", "tokens", "seconds", ...} of one report; nested numbers become TensorBoard scalars named by their
path, such as `routers/3/entropy`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def read_metrics(folder: Path, until: int | None = None) -> list[dict[str, Any]]:
    """The records in `folder` up to step `until`; a line that a killed run left half-written is no record."""
    path, records = folder / METRICS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if until is None or record["step"] <= until:
            records.append(record)
    return records


def scalars(record: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """(path, number) of every number of a record but the step; lists of layers by their number."""
    for key, value in record.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            yield from scalars(value, f"{name}/")
        elif isinstance(value, list):
            for part in value:
                yield from scalars({k: v for k, v in part.items() if k != "layer"}, f"{name}/{part['layer']}/")
        elif isinstance(value, int | float) and name != "step":
            yield name, float(value)


class Log:
    """The files of one run. A resumed run goes on at `step`: what a killed run wrote after it is dropped."""

    def __init__(self, folder: Path, step: int):
        self.folder = folder
        kept = read_metrics(folder, step)
        (folder / METRICS).write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=step + 1 if kept else None)

    def write(self, record: dict[str, Any]) -> None:
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.writer is not None:
            for name, value in scalars(record):
                self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Screen:
    """A progress bar over a table of losses in a terminal, a line per report elsewhere."""

    def __init__(self, steps: int, step: int, *, show: bool = True):
        self.console = Console(quiet=not show)
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self.task = self.bar.add_task("", total=steps, completed=step, note="")
        self.last: dict[str, Any] = {}
        self.heldout: dict[str, float] = {}
        self.live = Live(self._render(), console=self.console, refresh_per_second=4, transient=True)
        self.alive = show and self.console.is_terminal

    def __enter__(self) -> Screen:
        if self.alive:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.alive:
            self.live.stop()

    def step(self, loss: float) -> None:
        if self.alive:
            self.bar.update(self.task, advance=1, note=f"loss {loss:.3f}")

    def report(self, record: dict[str, Any]) -> None:
        """Show a record; in a terminal it replaces the last one."""
        if "heldout_domains" in record:
            self.heldout = record["heldout_domains"]
        else:
            self.last = record
        if self.alive:
            self.live.update(self._render())
        else:
            self.console.print(one_line(record), highlight=False, soft_wrap=True)

    def _render(self) -> Group:
        table = Table("domain", "loss", "held-out", box=None, pad_edge=False)
        domains = self.last.get("domains", {})
        for name in dict.fromkeys([*domains, *self.heldout]):
            cells = (f"{part[name]:.3f}" if name in part else "" for part in (domains, self.heldout))
            table.add_row(name, *cells)
        return Group(table, one_line(self.last) if self.last else "", self.bar)


def one_line(record: Mapping[str, Any]) -> str:
    """A record in a line."""
    if "heldout" in record:
        return f"step {record['step']:,}: held-out loss {record['heldout']:.4f}"
    parts = [f"step {record['step']:,}: loss {record['loss']:.4f}", f"rate {record['rate']:.2g}"]
    parts += [f"{name} {value:.4f}" for name, value in record["losses"].items()]
    routers = record["routers"]
    if routers:
        parts.append(f"max violation {max(r['max_violation'] for r in routers):.2f}")
        parts.append(f"dead {sum(r['dead'] for r in routers)}")
    return ", ".join([*parts, f"{record['tokens_per_second']:,} tokens/s"])
