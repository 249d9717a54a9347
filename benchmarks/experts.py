"""Speed of the `moestro` experts backend beside every transformers backend and a dense FFN of equal FLOPs.

All contestants take turns within one round, and what is reported is the median over rounds of the ratio of two times
of the same round, so that a busy machine slows all of them alike. Every round routes the tokens anew, as training
does: token counts per expert change, and with them the shapes of the products. "products alone" is one torch.mm per
expert and projection into memory at hand: what remains of a layer without routing, gates, sums and allocation.

    python benchmarks/experts.py            # everything, some minutes
    python benchmarks/experts.py --quick    # fewer rounds, smaller layers
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moestro.view.experts_backend  # noqa: F401  registers the backend

BACKENDS = ("moestro", "grouped_mm", "batched_mm", "eager")
WARM_UP = 3  # rounds: oneDNN compiles a kernel per shape of a bf16 product
DENSE, PRODUCTS = "dense", "products alone"
# `batched_mm` copies the weights of every slot: above this size it is left out. `eager` fills and adds a full-size
# weight gradient per expert: above this many numbers in all slots' inputs it takes many seconds, and is left out.
BATCHED_MM_BYTES = 1 << 29
EAGER_NUMBERS = 8_000_000


@dataclass(frozen=True)
class Layer:
    hidden: int
    width: int
    experts: int
    slots: int
    tokens: int

    def __str__(self) -> str:
        return f"H{self.hidden} I{self.width} E{self.experts} K{self.slots} N{self.tokens}"

    @property
    def forward_flops(self) -> int:
        return 2 * self.tokens * self.slots * self.hidden * 3 * self.width


TRAINING = (Layer(192, 96, 32, 4, 2048), Layer(512, 256, 32, 4, 2048), Layer(1024, 512, 64, 8, 1024))
PREFILL = Layer(2048, 1024, 64, 8, 512)  # one layer of OLMoE
DECODE = Layer(2048, 1024, 64, 8, 1)


@dataclass
class Result:
    task: str
    setting: str
    dtype: str
    backend: str
    milliseconds: float
    times_moestro: float  # median over rounds of time / moestro's time
    quartiles: tuple[float, float]
    gflops: float | None
    rounds: list[float] = field(default_factory=list)  # seconds


def take_turns(contestants: dict[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; `run` gets the number of the round. The first ones warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for r in range(WARM_UP + rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run(r)
            if r >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summarise(
    task: str, setting: str, dtype: torch.dtype, seconds: dict[str, list[float]], flops: int | None
) -> list[Result]:
    results = []
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["moestro"])]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        gflops = flops / median(own) / 1e9 if flops else None
        results.append(
            Result(task, setting, str(dtype)[6:], name, 1e3 * median(own), median(ratios), (low, high), gflops, own)
        )
    return results


def build_experts(layer: Layer, dtype: torch.dtype) -> Any:
    config = Qwen3MoeConfig(hidden_size=layer.hidden, moe_intermediate_size=layer.width, num_experts=layer.experts)
    experts = Qwen3MoeExperts(config).to(dtype)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.02)
    return experts


def route(layer: Layer, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layer.tokens, layer.experts, generator=generator)
    weights, indices = logits.softmax(-1).topk(layer.slots)
    return indices, (weights / weights.sum(-1, keepdim=True)).to(dtype)


def runnable(layer: Layer, dtype: torch.dtype, train: bool) -> list[str]:
    copied = layer.tokens * layer.slots * 3 * layer.hidden * layer.width * dtype.itemsize
    names = list(BACKENDS)
    if copied > BATCHED_MM_BYTES:
        names.remove("batched_mm")
    if train and layer.tokens * layer.slots * layer.hidden > EAGER_NUMBERS:
        names.remove("eager")
    return names


def time_layer(task: str, layer: Layer, dtype: torch.dtype, rounds: int, *, train: bool) -> list[Result]:
    experts = build_experts(layer, dtype).requires_grad_(train)
    hidden = torch.randn(layer.tokens, layer.hidden).to(dtype).requires_grad_(train)
    direction = torch.randn(layer.tokens, layer.hidden).to(dtype)
    up = (0.02 * torch.randn(2 * layer.slots * layer.width, layer.hidden)).to(dtype).requires_grad_(train)
    down = (0.02 * torch.randn(layer.hidden, layer.slots * layer.width)).to(dtype).requires_grad_(train)
    routes = [route(layer, dtype, seed) for seed in range(WARM_UP + rounds)]

    def finish(out: Tensor) -> None:
        if train:
            out.backward(direction)
        for t in (hidden, up, down, *experts.parameters()):
            t.grad = None

    def run_experts(name: str, r: int) -> None:
        indices, weights = routes[r]
        experts.config._experts_implementation = name
        finish(experts(hidden, indices, weights.requires_grad_(train)))

    def run_dense(r: int) -> None:
        gate, value = F.linear(hidden, up).chunk(2, dim=-1)
        finish(F.linear(F.silu(gate) * value, down))

    rows = layer.tokens * layer.slots
    x, u, a = (torch.zeros(rows, width, dtype=dtype) for width in (layer.hidden, 2 * layer.width, layer.width))
    grads = [torch.zeros_like(p) for p in experts.parameters()]

    def run_products(r: int) -> None:
        start = 0
        for e, count in enumerate(torch.bincount(routes[r][0].flatten(), minlength=layer.experts).tolist()):
            part = slice(start, start + count)
            start += count
            if not count:
                continue
            w_up, w_down = experts.gate_up_proj.data[e], experts.down_proj.data[e]
            torch.mm(x[part], w_up.T, out=u[part])
            torch.mm(a[part], w_down.T, out=x[part])
            if train:
                torch.mm(x[part], w_down, out=a[part])
                torch.mm(x[part].T, a[part], out=grads[1][e])
                torch.mm(u[part].T, x[part], out=grads[0][e])
                torch.mm(u[part], w_up, out=x[part])

    names = runnable(layer, dtype, train)
    contestants: dict[str, Callable[[int], None]] = {n: partial(run_experts, n) for n in names}
    contestants |= {DENSE: run_dense, PRODUCTS: run_products}
    with torch.set_grad_enabled(train):
        seconds = take_turns(contestants, rounds)
    return summarise(task, str(layer), dtype, seconds, layer.forward_flops * (3 if train else 1))


def time_model(dtype: torch.dtype, rounds: int, batch: int, length: int) -> list[Result]:
    """One training step of a whole model of quartet's size."""
    size: dict[str, Any] = dict(
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
        output_router_logits=True,
        tie_word_embeddings=True,
    )
    model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**size))
    model = model.to(dtype)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(name: str, r: int) -> None:
        model.set_experts_implementation(name)
        ids = torch.randint(6144, (batch, length), generator=torch.Generator().manual_seed(r))
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    names = [name for name in BACKENDS if name != "batched_mm"]
    seconds = take_turns({n: partial(step, n) for n in names}, rounds)
    return summarise("training step of a model", f"quartet's size, {batch} x {length} tokens", dtype, seconds, None)


def as_table(results: list[Result]) -> Table:
    table = Table(title="time / moestro's time: median over rounds (and quartiles); above 1, moestro is faster")
    for column in ("task", "setting", "dtype", "backend"):
        table.add_column(column)
    for column in ("ms", "times moestro", "GFLOP/s"):
        table.add_column(column, justify="right")
    last = None
    for r in results:
        key = (r.task, r.setting, r.dtype)
        if last is not None and key != last:
            table.add_section()
        ratio = f"{r.times_moestro:.2f} [{r.quartiles[0]:.2f}, {r.quartiles[1]:.2f}]"
        shown = key if key != last else ("", "", "")
        table.add_row(*shown, r.backend, f"{r.milliseconds:.2f}", ratio, f"{r.gflops:.0f}" if r.gflops else "")
        last = key
    return table


def main(
    quick: Annotated[bool, typer.Option(help="Fewer rounds, and only the smallest layers.")] = False,
    rounds: Annotated[int, typer.Option(help="Rounds per layer.", min=1)] = 9,
    threads: Annotated[int, typer.Option(help="Threads of torch; 0 leaves its own choice.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("benchmarks/results/experts.json"),
) -> None:
    """Time the experts backends: training step, prefill, decode, and a whole model's training step."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    rounds = min(rounds, 5) if quick else rounds
    results: list[Result] = []
    for dtype in (torch.float32, torch.bfloat16):
        for layer in TRAINING[:1] if quick else TRAINING:
            results += time_layer("forward + backward", layer, dtype, rounds, train=True)
    for layer, task in ((PREFILL, "prefill"), (DECODE, "decode one token")):
        results += time_layer(task, layer, torch.bfloat16, rounds, train=False)
    batch, length = (2, 128) if quick else (8, 512)
    for dtype in (torch.float32, torch.bfloat16):
        results += time_model(dtype, min(rounds, 5), batch, length)

    Console(width=120).print(as_table(results))
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
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
