"""report.html: what a fit kept, what it cost and how it was made, as one file that opens anywhere.

Everything is drawn as HTML and SVG, so the page loads no library, forbids every network request by its own content
security policy, and stays below 2 MB for 48 layers x 128 experts x 15 domains. Only its own script runs (the policy
names its hash); text that comes from models and users is escaped.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from moestro.report import figures
from moestro.report.page import script, templates, visible, write_whole

if TYPE_CHECKING:
    from moestro.fitting.result import DomainLoss, FitReport, LayerChoice, Sample

SALIENCIES = {
    "random": "a random number: the floor that every saliency must beat",
    "frequency": "how many tokens the expert served",
    "reap": "the mean norm of its gated output over the tokens it served (REAP, arXiv:2510.13999)",
    "easy-ep": (
        "the norm of its gated output, weighted by how much the experts changed the token, "
        "summed over the tokens it served (EASY-EP, arXiv:2504.06792)"
    ),
}
OPEN_SAMPLES = 6
"""Samples shown at once; the others unfold."""


def write_fit_page(report: FitReport, path: Path, *, checkpoint: str = ".") -> None:
    """Write the page to `path` at once or not at all. `checkpoint`: see `fit_page`."""
    write_whole(fit_page(report, checkpoint=checkpoint), path)


def fit_page(report: FitReport, *, checkpoint: str = ".") -> str:
    """The page as a string. `checkpoint` is where the loading examples point: `.`, the folder the page lies in."""
    environment = templates()
    own_script, digest = script(environment, "script.jinja")
    routed = routing(report)
    return environment.get_template("fit_page.jinja").render(
        report=report,
        name=report.model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or report.model,
        cost=cost(report),
        speed=figures.change_text(report.before.tokens_per_second, report.after.tokens_per_second),
        kept=sum(len(layer.kept) for layer in report.layers),
        experts=sum(layer.num_experts for layer in report.layers),
        uneven=len({len(layer.kept) for layer in report.layers}) > 1,
        groups=loss_groups(report.losses),
        axis=figures.loss_axis([v for d in report.losses for v in (d.before, d.after)]),
        map=expert_map(report),
        served=mean_served(report),
        states=states(report.layers),
        bits=information(report, routed),
        routed=routed,
        data=embedded(report, routed),
        samples=samples(report.samples, report.losses),
        open_samples=OPEN_SAMPLES,
        score=SALIENCIES.get(report.saliency),
        task_names=[d.domain for d in report.losses if d.task],
        loading=loading(checkpoint),
        loading_here=checkpoint == ".",
        style=Markup(environment.get_template("style.jinja").render()),
        script=own_script,
        script_hash=digest,
    )


# ------------------------------------------------------------------------------------------------ what it cost


@dataclass(frozen=True)
class Change:
    """A loss before and after."""

    before: float
    after: float

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def ratio(self) -> float:
        """Of the perplexities."""
        return figures.perplexity(self.difference)

    @property
    def words(self) -> str:
        """What happened to the loss, as a verb."""
        if not (math.isfinite(self.before) and math.isfinite(self.after)):
            return "could not be measured (it is not finite)"
        if abs(self.difference) < 0.0005:
            return f"stayed at {figures.loss_text(self.before)} nats per token"
        verb = "rose" if self.difference > 0 else "fell"
        return f"{verb} from {figures.loss_text(self.before)} to {figures.loss_text(self.after)} nats per token"

    @property
    def plainly(self) -> str:
        """The same as perplexity, for a reader who never met a nat."""
        if not (math.isfinite(self.before) and math.isfinite(self.after)):
            return ""
        before, after = (figures.significant(figures.perplexity(x)) for x in (self.before, self.after))
        percent = abs(100 * (self.ratio - 1))
        if percent < 0.05:
            return f"It is as sure of the next token as before: as if it chose between {before} equally likely ones."
        word = "less" if self.difference > 0 else "more"
        amount = f"{figures.significant(percent, 2)}%" if percent < 100 else f"{figures.significant(self.ratio)} times"
        return (
            f"Put plainly, it is {amount} {word} sure of each next token: as if it chose between {after} equally "
            f"likely ones, where the original chose between {before}."
        )


def cost(report: FitReport) -> dict[str, Change | None]:
    """Mean losses of the task and of the rest."""
    task, rest = report.mean_loss(task=True), report.mean_loss(task=False)
    return {"task": Change(*task) if task else None, "rest": Change(*rest) if rest else None}


def loss_groups(losses: Sequence[DomainLoss]) -> list[tuple[bool, list[tuple[DomainLoss, Change]]]]:
    """The task's domains, then the rest, those that lost most first."""
    groups = []
    for task in (True, False):
        rows = [(d, Change(d.before, d.after)) for d in losses if d.task == task]
        if rows:
            groups.append((task, sorted(rows, key=lambda row: -row[1].difference)))
    return groups


# ------------------------------------------------------------------------------------------------ the experts


def unseen(layer: LayerChoice) -> frozenset[int]:
    """Experts that no calibration token reached, also where a saliency gave them a score all the same."""
    reached = [any(row[e] for row in layer.tokens) for e in range(layer.num_experts)]
    return frozenset(e for e, score in enumerate(layer.scores) if score is None or not reached[e])


def task_rows(report: FitReport) -> list[int]:
    """Rows of the calibration counts that belong to the task; all, where calibration saw none of its domains."""
    task = {d.domain for d in report.losses if d.task}
    names = list(report.calibration)
    return [i for i, name in enumerate(names) if name in task] or list(range(len(names)))


def expert_map(report: FitReport) -> Markup:
    rows = task_rows(report)
    return figures.expert_map(
        [
            figures.MapRow(
                layer.layer,
                layer.num_experts,
                frozenset(layer.kept),
                unseen(layer),
                figures.served_by(layer.tokens, layer.kept, rows),
            )
            for layer in report.layers
        ]
    )


def mean_served(report: FitReport) -> float | None:
    """Mean over layers of the share of the task's routing that went to experts that were kept."""
    rows = task_rows(report)
    shares = [figures.served_by(layer.tokens, layer.kept, rows) for layer in report.layers]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def states(layers: Sequence[LayerChoice]) -> dict[str, int]:
    """How many experts stand in each state of the map."""
    counts = dict.fromkeys(("kept", "dropped", "unseen", "kept-unseen"), 0)
    for layer in layers:
        kept, blank = set(layer.kept), unseen(layer)
        counts["kept"] += len(kept - blank)
        counts["kept-unseen"] += len(kept & blank)
        counts["unseen"] += len(blank - kept)
        counts["dropped"] += layer.num_experts - len(kept | blank)
    return counts


@dataclass(frozen=True)
class Routing:
    """Whose tokens the original's experts served: what the specialisation figures draw."""

    domains: list[str]
    task: list[bool]
    counts: list[list[list[int]]]
    """[L, D, E]"""

    @property
    def order(self) -> list[int]:
        """Rows of the heat map: the task's domains first."""
        return sorted(range(len(self.domains)), key=lambda d: not self.task[d])


def routing(report: FitReport) -> Routing:
    """Read off the held-out data, which has all domains; calibration has the task's alone."""
    names, task = [d.domain for d in report.losses], [d.task for d in report.losses]
    return Routing(names, task, [layer.heldout_tokens for layer in report.layers])


def information(report: FitReport, routed: Routing) -> dict[str, Any] | None:
    """Mutual information between domain and expert per layer; None where there is one domain or none."""
    found = [figures.mutual_information(counts) for counts in routed.counts]
    bits = [value for value in found if value is not None]
    if not bits or len(bits) < len(found):
        return None
    layers = [layer.layer for layer in report.layers]
    return {
        "rows": list(zip(layers, bits)),
        "limit": math.log2(len(routed.domains)),
        "mean": sum(bits) / len(bits),
        "chart": figures.information_chart(layers, bits),
    }


def embedded(report: FitReport, routed: Routing) -> Markup:
    """The figures' numbers for the script; `<` is escaped, so no text in it can end the element."""
    data = {
        "calibration": [visible(name) for name in report.calibration],
        "domains": [{"name": visible(n), "task": t} for n, t in zip(routed.domains, routed.task)],
        "order": routed.order,
        "layers": [
            {
                "layer": layer.layer,
                "experts": layer.num_experts,
                "topK": layer.top_k,
                "kept": layer.kept,
                "scores": [None if s is None or not math.isfinite(s) else float(f"{s:.4g}") for s in layer.scores],
                "unseen": sorted(unseen(layer)),
                "tokens": layer.tokens,
                "routed": counts,
            }
            for layer, counts in zip(report.layers, routed.counts)
        ],
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


# ------------------------------------------------------------------------------------------------ samples, loading


def samples(found: Sequence[Sample], losses: Sequence[DomainLoss]) -> list[dict[str, Any]]:
    """The task's samples first; each continuation after the cut is split where it leaves the one before."""
    task = {d.domain for d in losses if d.task}
    shown = []
    for sample in sorted(found, key=lambda s: s.domain not in task):
        shorter = min(len(sample.before), len(sample.after))
        same = next((i for i in range(shorter) if sample.before[i] != sample.after[i]), shorter)
        shown.append(
            {
                "sample": sample,
                "task": sample.domain in task,
                "identical": sample.before == sample.after,
                "same": sample.after[:same],
                "new": sample.after[same:],
            }
        )
    return shown


def loading(checkpoint: str) -> list[tuple[str, str]]:
    """Where the result can be loaded, and how."""
    quoted, word = json.dumps(checkpoint, ensure_ascii=False), shlex.quote(checkpoint)
    return [
        (
            "transformers",
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f'model = AutoModelForCausalLM.from_pretrained({quoted}, dtype="auto")\n'
            f"tokenizer = AutoTokenizer.from_pretrained({quoted})",
        ),
        (
            "vLLM",
            "pip install vllm\n"
            f"vllm serve {word} --served-model-name fitted\n"
            "curl localhost:8000/v1/completions -H 'Content-Type: application/json' "
            """-d '{"model": "fitted", "prompt": "Hello"}'""",
        ),
        (
            "llama.cpp",
            "git clone https://github.com/ggml-org/llama.cpp && pip install -r llama.cpp/requirements.txt\n"
            f"python llama.cpp/convert_hf_to_gguf.py {word} --outfile fitted.gguf\n"
            'llama-cli -m fitted.gguf -p "Hello"',
        ),
    ]
