"""A Monet layer of 2^16 experts: its time beside a dense layer of the same active FLOPs, and the memory to train it.

Both layers compute forward and backward in turn, in one process, on the same tokens. The dense layer has as many
multiply-adds a token as Monet's parts (a ReLU^2 layer of S * M neurons); Monet's routing comes on top. The memory is
the peak of a process that trains a language model of such layers for a few steps with AdamW.

python benchmarks/monet.py [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from moestro.models.lm import MoELMConfig, MoELMForCausalLM
from moestro.models.monet import DECOMPOSITIONS, build_monet
from moestro.routing import RoutingContext

HIDDEN, PARTS, WIDTH, HEADS, TOP_K = 256, 256, 8, 4, 16
LIMIT_RATIO, LIMIT_BYTES = 3.0, 24 * 10**9


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, PARTS * WIDTH), nn.Linear(PARTS * WIDTH, HIDDEN)

    def forward(self, hidden: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        return self.down(self.up(hidden).relu().square())


def step(layer: nn.Module, hidden: torch.Tensor) -> float:
    """Seconds of one forward and backward."""
    context = RoutingContext(shape=(hidden.shape[0], hidden.shape[1]))
    start = time.perf_counter()
    layer(hidden, context).square().mean().backward()
    seconds = time.perf_counter() - start
    layer.zero_grad()
    return seconds


def monet(decompose: str) -> nn.Module:
    """The dearest layer of a group: the one with the router."""
    config = MoELMConfig(hidden_size=HIDDEN, num_hidden_layers=1)
    return build_monet(config, 0, {}, parts=PARTS, heads=HEADS, width=WIDTH, top_k=TOP_K, decompose=decompose)


def train(steps: int, queue: multiprocessing.Queue) -> None:
    torch.manual_seed(0)
    block = dict(kind="monet", parts=PARTS, heads=HEADS, width=WIDTH, top_k=TOP_K, group=4)
    config = MoELMConfig(
        vocab_size=6144,
        hidden_size=HIDDEN,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
        block=block,
    )
    model = MoELMForCausalLM(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 6144, (8, 128))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    parameters = sum(p.numel() for p in model.parameters())
    queue.put((losses[0], losses[-1], parameters, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6, help="training steps of the memory measurement")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()

    torch.manual_seed(0)
    ways = {"dense": Dense(), **{f"Monet, {d}": monet(d) for d in DECOMPOSITIONS}}
    hidden = torch.randn(1, options.tokens, HIDDEN, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for attempt in range(options.rounds + 1):
        for name, layer in ways.items():
            seconds = step(layer.train(), hidden)
            if attempt:  # the first round warms up
                times[name].append(seconds)
    medians = {name: statistics.median(t) for name, t in times.items()}
    ratios = {name: median / medians["dense"] for name, median in medians.items()}

    queue: multiprocessing.Queue = multiprocessing.get_context("spawn").Queue()
    worker = multiprocessing.get_context("spawn").Process(target=train, args=(options.steps, queue))
    worker.start()
    first, last, parameters, peak = queue.get()
    worker.join()

    console = Console()
    for name, median in medians.items():
        console.print(f"{name}: {median * 1000:.0f} ms for {options.tokens} tokens, {ratios[name]:.2f} x dense")
    console.print(
        f"training 8 layers of {PARTS**2} experts, {parameters / 1e6:.1f} M parameters: peak {peak / 1e9:.2f} GB, loss "
        f"{first:.2f} -> {last:.2f} in {options.steps} steps"
    )
    met = max(ratios.values()) <= LIMIT_RATIO and peak <= LIMIT_BYTES
    console.print(f"at most {LIMIT_RATIO:g} x dense and {LIMIT_BYTES / 1e9:g} GB: {'met' if met else 'not met'}")
    if options.json:
        found = dict(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=f"{platform.machine()}, {torch.get_num_threads()} threads",
            tokens=options.tokens,
            seconds=medians,
            times_dense=ratios,
            parameters=parameters,
            peak_bytes=peak,
        )
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
