"""What observing costs: a plain forward pass beside the same pass with observers, in turn in one run.

python benchmarks/observe.py [--model quartet] [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

import moestro
from moestro.compress.prune.easy_ep import EasyEPStats
from moestro.data import embedded, limit_tokens, token_batches
from moestro.view.observe import RoutingTrace, SlotStats


def plain(view, batches) -> None:
    with torch.no_grad():
        for batch in batches:
            view.stack(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quartet", help="bundled model, directory or hub name")
    parser.add_argument("--tokens", type=int, default=16_000, help="tokens per pass")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()

    view = moestro.open(options.model)
    batches = token_batches(embedded(), view.tokenizer, max_length=512, batch_size=8)
    batches = list(limit_tokens(batches, options.tokens, per_domain=False))
    ways = {
        "plain, moestro backend": lambda: plain(view, batches),
        "slot statistics": lambda: view.observe(batches, [SlotStats()], progress=False),
        "easy-ep statistics": lambda: view.observe(batches, [EasyEPStats()], progress=False),
        "routing trace with logits": lambda: view.observe(batches, [RoutingTrace()], progress=False),
    }
    implementation = view.model.config._experts_implementation
    times: dict[str, list[float]] = {name: [] for name in ["plain", *ways]}
    for attempt in range(options.rounds + 1):
        for name, run in {"plain": ways["plain, moestro backend"], **ways}.items():
            view.model.set_experts_implementation(implementation if name == "plain" else "moestro")
            start = time.perf_counter()
            run()
            if attempt:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    table = Table("pass", "tokens/s", "x plain", title=f"{options.model}, {options.tokens:,} tokens")
    rows = {}
    for name, seconds in times.items():
        ratio = statistics.median(s / p for s, p in zip(seconds, times["plain"]))
        rows[name] = {"seconds": statistics.median(seconds), "times_plain": ratio}
        table.add_row(name, f"{options.tokens / statistics.median(seconds):,.0f}", f"{ratio:.2f}")
    Console().print(table)
    if options.json:
        record = {
            "date": datetime.now(UTC).isoformat(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "plain_backend": implementation,
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
