"""What a router adds to the time of a training step, beside plain top-k: same model, same experts, same slots.

The model has quartet's size (see train.py); all routers take turns within one round on the same tokens, and what is
reported is the median over rounds of the ratio of two times of the same round. Top-p may use as many experts a token as
top-k. COMET and the temperature gate begin with all experts, and are timed so, beside top-k of all experts: what their
papers ask for beyond the router's own cost is the ratio of that row to the first.

    python benchmarks/routers.py
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import moestro
from moestro.models.lm import MoELMConfig, MoELMForCausalLM
from moestro.view.observe import ExpertCounts
from train import SIZE, train_step

WARM_UP = 3
TOP_K = "top_k"
ROUTERS: dict[str, dict[str, Any]] = {
    TOP_K: dict(router="top_k"),
    "sigmoid": dict(router="sigmoid"),
    "hash": dict(router="hash"),
    "random": dict(router="random"),
    "expert_choice": dict(router="expert_choice"),
    "top_p (at most top-k)": dict(router={"kind": "top_p", "max_experts": SIZE["num_experts_per_tok"]}),
    "comet": dict(router="comet"),
    "permuted comet": dict(router={"kind": "permuted", "router": "comet", "steps": 1}),
    "recurrent": dict(router={"kind": "recurrent", "state_size": 64}),
    "previous_logits": dict(router="previous_logits"),
    "temperature": dict(router={"kind": "temperature", "activation": "sigmoid"}),
    "similarity_aware": dict(router="similarity_aware"),
    "attention_aware, eager": dict(router="attention_aware", attn_implementation="eager"),
    "top_k, eager": dict(router="top_k", attn_implementation="eager"),
    "sparsity_aware": dict(router="sparsity_aware", experts={"kind": "ungated", "activation": "relu"}),
    "top_k, ungated": dict(router="top_k", experts={"kind": "ungated", "activation": "relu"}),
    "top_k, all experts": dict(router="top_k", num_experts_per_tok=SIZE["num_experts"]),
}
"""{name: changes to the model}"""
BASELINES = {
    "attention_aware, eager": "top_k, eager",
    "sparsity_aware": "top_k, ungated",
    **dict.fromkeys(("comet", "permuted comet", "temperature"), "top_k, all experts"),
}
"""Plain top-k in the model that differs from the router's in nothing else; by default the first."""


@dataclass
class Result:
    router: str
    beside: str
    milliseconds: float
    ratio: float  # median over rounds of time / time of the plain router
    quartiles: tuple[float, float]
    slots: float  # experts a token uses


def slots_of(model: Any, ids: torch.Tensor) -> float:
    try:
        view = moestro.open(model)
    except ValueError:
        return float("nan")
    (counts,) = view.observe([ids], [ExpertCounts()], progress=False)
    return sum(float(c.sum()) for c in counts.values()) / (len(counts) * ids.numel())


def main(
    rounds: Annotated[int, typer.Option(help="Rounds that count.", min=1)] = 11,
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 256,
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("benchmarks/results/routers.json"),
) -> None:
    """Time training steps with every router."""
    models: dict[str, Any] = {}
    for name, changes in ROUTERS.items():
        torch.manual_seed(0)
        models[name] = MoELMForCausalLM(MoELMConfig(**SIZE | {"fused_loss": True} | changes)).train()
    optimisers = {name: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for name, m in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for r in range(WARM_UP + rounds):
        ids = torch.randint(SIZE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(r))
        for name, model in models.items():
            start = perf_counter()
            train_step(model, optimisers[name], ids)
            if r >= WARM_UP:
                seconds[name].append(perf_counter() - start)
    results = []
    for name, own in seconds.items():
        beside = BASELINES.get(name, TOP_K)
        ratios = [a / b for a, b in zip(own, seconds[beside])]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        slots = slots_of(models[name], ids)
        results.append(Result(name, beside, 1e3 * median(own), median(ratios), (low, high), slots))
    table = Table("router", "beside", title=f"a step of {batch} x {length} tokens, beside the plain router's")
    for column in ("ms", "times", "slots"):
        table.add_column(column, justify="right")
    for r in results:
        ratio = f"{r.ratio:.2f} [{r.quartiles[0]:.2f}, {r.quartiles[1]:.2f}]"
        table.add_row(r.router, r.beside, f"{r.milliseconds:.0f}", ratio, f"{r.slots:.2f}")
    Console(width=100).print(table)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "setting": {"batch": batch, "length": length, "rounds": rounds},
        "results": [asdict(r) for r in results],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
