"""One trainer for every recipe and every causal language model of transformers.

A step, for a batch that is the same however it is divided over processes and micro-batches:

    for each micro-batch of mine:  gradients of (next-token loss + routers' losses) / micro-batches of the batch
    add up over processes -> clip -> AdamW on fp32 weights -> round to the computing type -> tell the routers

AdamW: "Decoupled Weight Decay Regularization" (arXiv:1711.05101). What a run needs to go on is in its folder: a killed
run that is started again ends with the same weights, bit for bit. Router state has to live in buffers for that.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moestro.directories import some_path
from moestro.layers import after_step
from moestro.report import write_train_page
from moestro.train import checkpoint
from moestro.train.health import RouterHealth, first_non_finite
from moestro.train.logs import Log, Screen, read_metrics
from moestro.train.masters import Masters
from moestro.train.objective import BatchLoss, Objective
from moestro.train.packing import Rows, batch_rows
from moestro.train.plan import Plan
from moestro.train.processes import add_up_gradients, join, share_counts

NO_SETTINGS = {"dtype", "_name_or_path", "transformers_version", "fused_loss"}
"""Keys of a model's config that do not change what is trained."""
PROBE_TOKENS = 16
REPORT = "report.html"


class Trainer:
    """A run that can be stopped and resumed at any checkpoint.

    `folder` holds checkpoint.pt, metrics.jsonl, TensorBoard's files and, at the end, report.html and the trained model
    in `model/`. `name` is the report's title.

    Raises ValueError, before any work, where the data holds less than a batch, rows are longer than the model's
    positions, micro-batches cannot be divided over the processes, or `folder` holds a run with other settings.
    """

    def __init__(
        self,
        model: Any,
        rows: Rows,
        plan: Plan,
        folder: Path,
        *,
        heldout: Rows | None = None,
        name: str = "training",
        progress: bool = True,
        on_step: Callable[[int, Any], None] | None = None,
    ):
        self.processes = join()
        self.plan, self.rows, self.heldout, self.folder = plan, rows, heldout, some_path(folder, "folder")
        self._check(model)
        self.name, self.progress, self.on_step = name, progress, on_step
        self.step, self.saved_step, self.seconds = 0, 0, 0.0
        torch.manual_seed(plan.seed + self.processes.rank)
        self.model = model.to(self.processes.device or model.device).train()
        self.health = RouterHealth(model)
        self.objective = Objective(model, self._ids(np.arange(1))[:, :PROBE_TOKENS], plan.router_losses)
        self.masters = Masters(model, plan.precision)
        self.weights = list(self.masters.weights.values())
        self.processes.copy_first(self.weights)
        self.masters.publish()
        fused = all(w.device.type in ("cpu", "cuda") for w in self.weights)
        groups = self.masters.groups(plan.weight_decay)
        self.optimiser = torch.optim.AdamW(groups, lr=plan.peak_rate, betas=plan.betas, fused=fused)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()

    # ------------------------------------------------------------------------------------------------ before work

    def _check(self, model: Any) -> None:
        plan, rows, count = self.plan, self.rows, self.processes.count
        if len(rows) < plan.batch_rows:
            raise ValueError(
                f"the data has {len(rows)} rows of {rows.length} tokens, less than one batch of {plan.batch_rows}; "
                "give more data, smaller batches or shorter rows"
            )
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and rows.length > positions:
            raise ValueError(f"rows of {rows.length} tokens for a model of {positions} positions; shorten the rows")
        if (plan.batch_rows // plan.micro) % count:
            raise ValueError(
                f"a batch of {plan.batch_rows} rows in micro-batches of {plan.micro} cannot be divided evenly over "
                f"{count} processes; set micro_rows so that their number is a multiple of {count}"
            )

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that wrote the checkpoint."""
        config = self.model.config
        names = {own: name for name, own in config.attribute_map.items()}
        sizes = {k: v for k, v in config.to_diff_dict().items() if k not in NO_SETTINGS}
        return {
            "plan": self.plan.settings(),
            "model": {names.get(k, k): _plain(v) for k, v in sizes.items()},
            "data": self.rows.describe(),
            "processes": self.processes.count,
        }

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write the checkpoint."""
        random_states = self.processes.collect(checkpoint.random_state())
        if self.processes.rank == 0:
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "settings": self.settings(),
                "weights": {name: w.detach() for name, w in self.masters.weights.items()},
                "buffers": checkpoint.buffers(self.model),
                "optimiser": self.optimiser.state_dict(),
                "random": random_states,
            }
            checkpoint.write(self.folder, state)
        self.saved_step = self.step

    def resume(self) -> None:
        """Continue from the folder's checkpoint where there is one."""
        state = checkpoint.read(self.folder)
        if state is None:
            return
        checkpoint.check_same(state["settings"], self.settings(), self.folder)
        self.step, self.seconds = state["step"], state["seconds"]
        self.saved_step = self.step
        self.masters.load(state["weights"])
        checkpoint.set_buffers(self.model, state["buffers"])
        self.optimiser.load_state_dict(state["optimiser"])
        checkpoint.set_random_state(state["random"][self.processes.rank])

    # ------------------------------------------------------------------------------------------------ a step

    def _ids(self, numbers: np.ndarray, rows: Rows | None = None) -> Tensor:
        tokens = np.asarray((rows or self.rows).tokens[np.asarray(numbers)])
        return torch.from_numpy(tokens.astype(np.int64)).to(self.processes.device or self.model.device)

    def _micro_batches(self) -> list[np.ndarray]:
        """Row numbers of this process's micro-batches of the present step."""
        seed = self.plan.seed if self.plan.shuffle else None
        numbers = batch_rows(len(self.rows), self.plan.batch_rows, self.step, seed)
        parts = numbers.reshape(-1, self.plan.micro)
        return list(parts[self.processes.rank :: self.processes.count])

    def train_step(self) -> dict[str, Any]:
        """One optimiser step: {"loss", "losses", "grad_norm", "rate", "rows": losses of the rows, "domain": theirs}."""
        plan = self.plan
        decoder = self.model.get_decoder()
        if hasattr(decoder, "progress"):
            decoder.progress = self.step / plan.steps
        parts, seen = self._micro_batches(), []
        for numbers in parts:
            ids = self._ids(numbers)
            loss = self.objective(ids)
            self._refuse_non_finite(loss, ids)
            (loss.total * (plan.micro / plan.batch_rows)).backward()
            self.masters.collect_gradients()
            seen.append((loss.mean.detach(), {n: t.detach() for n, t in loss.terms.items()}, loss.each))
        add_up_gradients(self.processes, self.weights)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, plan.clip)
        self._refuse_gradient(norm)
        rate = plan.rate(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.masters.publish()
        share_counts(self.processes, self.model)
        self.step += 1
        after_step(self.model, self.step / plan.steps)
        self.processes.copy_first(self.model.buffers())
        means = torch.stack([torch.stack([mean, *terms.values()]).float() for mean, terms, _ in seen]).mean(0)
        self.processes.add_up([means])
        values = (means / self.processes.count).tolist()
        return {
            "loss": values[0],
            "losses": dict(zip(seen[0][1], values[1:])),
            "grad_norm": float(norm),
            "rate": rate,
            "rows": torch.cat([each.float().mean(1) for *_, each in seen]).cpu(),
            "domain": self.rows.domain[np.concatenate(parts)],
        }

    def _refuse_non_finite(self, loss: BatchLoss, ids: Tensor) -> None:
        if bool(torch.isfinite(loss.total)):
            return
        place = first_non_finite(self.model, lambda: self.objective(ids))
        if place is None:
            bad = [name for name, term in loss.terms.items() if not bool(torch.isfinite(term))]
            place = f"the loss {', '.join(bad)}" if bad else "the head's loss"
        raise FloatingPointError(
            f"the loss is {float(loss.total.detach())} at step {self.step}; the first non-finite numbers come out of "
            f"{place}; {self._last_good()}"
        )

    def _refuse_gradient(self, norm: Tensor) -> None:
        if bool(torch.isfinite(norm)):
            return
        names = [n for n, w in self.masters.weights.items() if w.grad is not None and not w.grad.isfinite().all()]
        raise FloatingPointError(
            f"the gradient's norm is {float(norm)} at step {self.step}; it is not finite in "
            f"{', '.join(names[:3]) or 'any sum of squares'}; {self._last_good()}"
        )

    def _last_good(self) -> str:
        path = self.folder / checkpoint.FILE
        return f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"

    # ------------------------------------------------------------------------------------------------ a run

    @torch.no_grad()
    def evaluate(self, rows: Rows, rows_per_domain: int) -> dict[str, float]:
        """Held-out loss per domain over the first `rows_per_domain` rows of each."""
        self.model.eval()
        sums = torch.zeros(len(rows.domains), 2, dtype=torch.float64)
        for index in range(len(rows.domains)):
            mine = np.flatnonzero(rows.domain == index)[:rows_per_domain][self.processes.rank :: self.processes.count]
            for numbers in (mine[i : i + self.plan.micro] for i in range(0, len(mine), self.plan.micro)):
                each = self.objective(self._ids(numbers, rows)).each
                sums[index] += torch.tensor([float(each.double().sum()), each.numel()], dtype=torch.float64)
        self.model.train()
        self.processes.add_up([sums])
        return {name: float(total / n) for name, (total, n) in zip(rows.domains, sums) if n}

    def run(self) -> None:
        """Train to the end of the plan, then write the model and the report."""
        plan, main = self.plan, self.processes.rank == 0
        log = Log(self.folder, self.step) if main else None
        window = Window(self.rows)
        with Screen(plan.steps, self.step, show=self.progress and main) as screen:
            while self.step < plan.steps:
                since = time.monotonic()
                done = self.train_step()
                self.seconds += time.monotonic() - since
                window.add(done, time.monotonic() - since)
                screen.step(done["loss"])
                last = self.step == plan.steps
                if self.step % plan.log_every == 0 or last:
                    self._report(window.record(self), log, screen)
                    window = Window(self.rows)
                if self.heldout is not None and (self.step % plan.evaluate_every == 0 or last):
                    domains = self.evaluate(self.heldout, plan.evaluate_rows)
                    record = {"heldout": float(np.mean(list(domains.values()))), "heldout_domains": domains}
                    self._report(self._stamp() | record, log, screen)
                if self.step % plan.save_every == 0 or last:
                    self.save()
                if self.on_step is not None:
                    self.on_step(self.step, self.model)
        self._finish()
        if log is not None:
            log.close()

    def _stamp(self) -> dict[str, Any]:
        tokens = self.step * self.plan.batch_rows * self.rows.length
        return {"step": self.step, "tokens": tokens, "seconds": round(self.seconds, 2)}

    def _report(self, record: dict[str, Any], log: Log | None, screen: Screen) -> None:
        if log is not None:
            log.write(record)
            screen.report(record)

    def _finish(self) -> None:
        decoder = self.model.get_decoder()
        if hasattr(decoder, "progress"):
            decoder.progress = 1.0
        self.model.eval()
        if self.processes.rank == 0:
            self.model.save_pretrained(self.folder / "model")
            facts = {
                "parameters": f"{sum(p.numel() for p in self.model.parameters()):,}",
                "steps": f"{self.plan.steps:,} of {self.plan.batch_rows} rows x {self.rows.length} tokens",
                "precision": self.plan.precision,
                "processes": str(self.processes.count),
            }
            write_train_page(read_metrics(self.folder), self.folder / REPORT, name=self.name, facts=facts)


class Window:
    """What happened since the last report."""

    def __init__(self, rows: Rows):
        self.rows, self.seconds, self.steps = rows, 0.0, 0
        self.sums: dict[str, float] = defaultdict(float)
        self.by_domain = torch.zeros(len(rows.domains), 2, dtype=torch.float64)

    def add(self, done: dict[str, Any], seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds
        self.last = done
        for name, value in {"loss": done["loss"], "grad_norm": done["grad_norm"]}.items():
            self.sums[name] += value
        for name, value in done["losses"].items():
            self.sums[f"losses/{name}"] += value
        domain = torch.from_numpy(np.asarray(done["domain"], dtype=np.int64))
        self.by_domain[:, 0].index_add_(0, domain, done["rows"].double())
        self.by_domain[:, 1].index_add_(0, domain, torch.ones(len(domain), dtype=torch.float64))

    def record(self, trainer: Trainer) -> dict[str, Any]:
        """Means over the steps since the last report."""
        trainer.processes.add_up([self.by_domain])
        means = {name: round(total / self.steps, 5) for name, total in self.sums.items()}
        tokens = self.steps * trainer.plan.batch_rows * self.rows.length
        return trainer._stamp() | {
            "loss": means["loss"],
            "rate": self.last["rate"],
            "grad_norm": means["grad_norm"],
            "tokens_per_second": round(tokens / self.seconds),
            "losses": {name.removeprefix("losses/"): v for name, v in means.items() if name.startswith("losses/")},
            "domains": {d: round(float(s / n), 4) for d, (s, n) in zip(self.rows.domains, self.by_domain) if n},
            "routers": trainer.health.report(trainer.processes),
        }


def _plain(value: Any) -> Any:
    """A config value as a checkpoint can hold it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
