"""Speed of a training step: MoELMForCausalLM beside transformers' Qwen3MoeForCausalLM, of quartet's size.

All contestants take turns within one round on the same tokens, and what is reported is the median over rounds of the
ratio of two times of the same round, so that a busy machine slows all of them alike. A step is forward, loss with the
routers' balance loss, backward and AdamW (fused, for all of them). Warm-up rounds are many: oneDNN compiles a kernel
for every new shape of a 16-bit product, and shapes come from how many tokens an expert serves.

The profile says where the time of one of our steps goes: the processor time of operators, by the part of the model
that called them (forward), or the function whose gradient they are (backward).

    python benchmarks/train.py              # some minutes
    python benchmarks/train.py --quick      # few rounds, short rows
"""

from __future__ import annotations

import json
import os
import platform
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moestro.view.experts_backend  # noqa: F401  registers the backend
from moestro.models.lm import MoELMConfig, MoELMForCausalLM

WARM_UP = 8
OURS = "MoELMForCausalLM"
SIZE: dict[str, Any] = dict(
    vocab_size=6144,
    hidden_size=192,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=96,
    norm_topk_prob=True,
    tie_word_embeddings=True,
)
PARTS = {  # by a piece of a module's name
    "self_attn": "attention",
    "norm": "norms",
    "mlp.experts": "experts",
    "mlp.router": "router",
    "lm_head": "head and loss",
    "embed_tokens": "embedding",
}
BACKWARD = {  # by a piece of a backward function's name
    "_Experts": "experts",
    "_BlockedCausal": "attention",
    "_Rotary": "attention",
    "_Linear": "attention",  # the projections: these models have no other linear maps
    "_RMSNorm": "norms",
    "_HeadLoss": "head and loss",
    "Embedding": "embedding",
    "Topk": "router",
    "Softmax": "router",
}
DONE = {
    "attention": "causal blocks that stay in cache; rotary positions in place; fp32 projections by oneDNN",
    "norms": "gradient by hand, two passes less over the data",
    "experts": "the moestro backend, as it was",
    "router": "nothing: fp32 by design",
    "head and loss": "no logits kept, gradient made in the forward, fp32 products by oneDNN",
    "optimiser": "nothing: torch's fused AdamW",
    "embedding": "nothing",
    "other": "nothing: residual sums, copies, balance loss, what has no owner",
}
"""What was done about each part, against transformers' step."""


@dataclass
class Result:
    dtype: str
    setting: str
    contestant: str
    milliseconds: float
    tokens_per_second: float
    times_ours: float  # median over rounds of time / our time
    quartiles: tuple[float, float]
    rounds: list[float] = field(default_factory=list)  # seconds


@dataclass
class Part:
    dtype: str
    part: str
    forward: float  # milliseconds
    backward: float
    share: float
    done: str


def models(dtype: torch.dtype) -> dict[str, tuple[Any, str]]:
    """{contestant: (model, experts backend)}; those of transformers share one model."""
    torch.manual_seed(0)
    losses = {"load_balance": 0.01}
    ours = MoELMForCausalLM(MoELMConfig(**SIZE, router_losses=losses, fused_loss=True)).to(dtype).train()
    theirs: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, output_router_logits=True, router_aux_loss_coef=0.01))
    theirs = theirs.to(dtype).train()
    names = ("grouped_mm", "batched_mm", "eager", "moestro")
    return {OURS: (ours, "moestro")} | {f"Qwen3MoeForCausalLM, {name}": (theirs, name) for name in names}


def optimisers(contestants: dict[str, tuple[Any, str]]) -> dict[int, torch.optim.Optimizer]:
    return {id(m): torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m, _ in contestants.values()}


def train_step(model: Any, optimiser: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with record_function("optimiser"):
        optimiser.step()
        optimiser.zero_grad()


def time_steps(dtype: torch.dtype, rounds: int, batch: int, length: int) -> list[Result]:
    contestants = models(dtype)
    optimiser = optimisers(contestants)
    copied = batch * length * SIZE["num_experts_per_tok"] * 3 * SIZE["hidden_size"] * SIZE["moe_intermediate_size"]
    if copied * dtype.itemsize > 1 << 29:  # it copies the weights of every slot
        del contestants["Qwen3MoeForCausalLM, batched_mm"]

    def run(model: Any, backend: str, r: int) -> None:
        model.set_experts_implementation(backend)
        ids = torch.randint(SIZE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(r))
        train_step(model, optimiser[id(model)], ids)

    steps: dict[str, Callable[[int], None]] = {n: partial(run, *pair) for n, pair in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for r in range(WARM_UP + rounds):
        for name, step in steps.items():
            start = perf_counter()
            step(r)
            if r >= WARM_UP:
                seconds[name].append(perf_counter() - start)
    results = []
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[OURS])]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        speed = batch * length / median(own)
        setting = f"{batch} x {length} tokens"
        results.append(
            Result(str(dtype)[6:], setting, name, 1e3 * median(own), speed, median(ratios), (low, high), own)
        )
    return results


@contextmanager
def labelled(model: nn.Module):
    """Every call of a part of the model is a range of the profile."""
    undo = []
    for name, module in model.named_modules():
        part = part_of(name)
        if part is None or part_of(name.rpartition(".")[0]) == part:
            continue
        plain = module.forward

        def forward(*args: Any, plain: Any = plain, part: str = part, **kwargs: Any) -> Any:
            with record_function(f"part {part}"):
                return plain(*args, **kwargs)

        module.forward = forward  # type: ignore[method-assign]
        undo.append((module, plain))
    try:
        yield
    finally:
        for module, plain in undo:
            module.forward = plain


def part_of(name: str) -> str | None:
    inner = "self_attn" in name and "norm" in name  # norms of queries and keys
    return "norms" if inner else next((part for piece, part in PARTS.items() if piece in name), None)


def profile_step(dtype: torch.dtype, batch: int, length: int) -> list[Part]:
    """Processor time of one of our steps, by part."""
    model, _ = models(dtype)[OURS]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    draws = torch.Generator().manual_seed(0)
    batches = [torch.randint(SIZE["vocab_size"], (batch, length), generator=draws) for _ in range(WARM_UP + 1)]
    for ids in batches[:-1]:
        train_step(model, optimiser, ids)
    with profile(activities=[ProfilerActivity.CPU]) as recorded, labelled(model):
        train_step(model, optimiser, batches[-1])
    times: dict[tuple[str, str], float] = defaultdict(float)
    for event in recorded.events():
        times[_owner(event)] += event.self_cpu_time_total / 1e3
    total = sum(times.values())
    parts = sorted({part for part, _ in times}, key=lambda p: -times[p, "forward"] - times[p, "backward"])
    found = []
    for part in parts:
        forward, backward = times[part, "forward"], times[part, "backward"]
        found.append(Part(str(dtype)[6:], part, forward, backward, (forward + backward) / total, DONE[part]))
    return found


def _owner(event: Any) -> tuple[str, str]:
    """(part, direction) of an operator, by the innermost range or backward function that it lies in."""
    while event is not None:
        if event.name.startswith("part "):
            return event.name.removeprefix("part "), "forward"
        if event.name == "optimiser":
            return "optimiser", "forward"
        if event.name == "_HeadLoss":
            return "head and loss", "forward"
        if event.name.startswith("autograd::engine::evaluate_function"):
            name = event.name.rpartition(": ")[2]
            return next((part for piece, part in BACKWARD.items() if piece in name), "other"), "backward"
        event = event.cpu_parent
    return "other", "forward"


def speeds(results: list[Result]) -> Table:
    table = Table(title="time / our time: median over rounds (and quartiles); above 1, MoELMForCausalLM is faster")
    for column in ("dtype", "step", "model, experts backend"):
        table.add_column(column)
    for column in ("ms", "tokens/s", "times ours"):
        table.add_column(column, justify="right")
    for r in results:
        ratio = f"{r.times_ours:.2f} [{r.quartiles[0]:.2f}, {r.quartiles[1]:.2f}]"
        table.add_row(r.dtype, r.setting, r.contestant, f"{r.milliseconds:.0f}", f"{r.tokens_per_second:,.0f}", ratio)
    return table


def profiles(parts: list[Part]) -> Table:
    table = Table(title="where one of our steps spends its processor time")
    for column in ("dtype", "part", "forward, ms", "backward, ms", "share", "what was done"):
        table.add_column(column, justify="right" if column.endswith(("ms", "share")) else "left")
    for p in parts:
        table.add_row(p.dtype, p.part, f"{p.forward:.0f}", f"{p.backward:.0f}", f"{p.share:.0%}", p.done)
    return table


def main(
    quick: Annotated[bool, typer.Option(help="Few rounds, short rows.")] = False,
    rounds: Annotated[int, typer.Option(help="Rounds that count.", min=1)] = 11,
    threads: Annotated[int, typer.Option(help="Threads of torch; 0 leaves its own choice.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("benchmarks/results/train.json"),
) -> None:
    """Time training steps, and say where the time of ours goes."""
    if threads:
        torch.set_num_threads(threads)
    batch, length, rounds = (2, 128, min(rounds, 5)) if quick else (8, 512, rounds)
    results: list[Result] = []
    parts: list[Part] = []
    for dtype in (torch.float32, torch.bfloat16):
        results += time_steps(dtype, rounds, batch, length)
        parts += profile_step(dtype, batch, length)
    console = Console(width=120)
    console.print(speeds(results))
    console.print(profiles(parts))
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_average": os.getloadavg()[0],  # well above the number of cores: ratios hold, milliseconds do not
        "results": [asdict(r) for r in results],
        "profile": [asdict(p) for p in parts],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
