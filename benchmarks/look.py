"""What `moestro look` costs beside a plain forward pass over the same batches, in turn in one run.

python benchmarks/look.py [--model quartet] [--tokens 200000] [--rounds 3] [--json FILE]

"plain" is the model as transformers runs it, "plain, moestro backend" the same with the experts backend on which a look
runs. The look is the whole of it: the pass with all observers, the conclusions, the page and its files.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

import moestro
from moestro.data import limit_tokens
from moestro.looking import pipeline

WARM_UP = 10_000
"""Tokens of the round that does not count."""


def plain(view, batches) -> None:
    with torch.no_grad():
        for batch in batches:
            view.stack(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def whole(view, batches, folder: Path) -> float:
    """Looks at the batches; returns what the pass alone took."""
    chosen = pipeline.check_layers(view, None)
    reference = pipeline.check_reference(batches, None)
    seen = pipeline.collect(view, batches, reference=reference, layers=chosen, seed=0, progress=False)
    pipeline.write(pipeline.conclude("quartet", seen, progress=False), seen, folder)
    return seen.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quartet", help="bundled model, directory or hub name")
    parser.add_argument("--tokens", type=int, default=200_000, help="tokens per pass, over all embedded domains")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()

    view = moestro.open(options.model)
    everything = pipeline.read_data(view, list(pipeline.DEFAULT_DATA), tokens=2**31, max_length=None, seed=0)
    batches = limit_tokens(everything, options.tokens, per_domain=False)
    few = limit_tokens(everything, min(WARM_UP, options.tokens), per_domain=False)
    implementation = view.model.config._experts_implementation
    times: dict[str, list[float]] = {"plain": [], "plain, moestro backend": [], "the pass of a look": [], "look": []}
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(options.rounds + 1):
            for name in ("plain", "plain, moestro backend", "look"):
                view.model.set_experts_implementation("moestro" if name.endswith("backend") else implementation)
                data = batches if attempt else few  # the first round warms up
                start = time.perf_counter()
                inner = whole(view, data, Path(folder)) if name == "look" else plain(view, data)
                if attempt:
                    times[name].append(time.perf_counter() - start)
                    if inner is not None:
                        times["the pass of a look"].append(inner)
    table = Table("", "seconds", "x plain", title=f"{options.model}, {batches.num_tokens:,} tokens")
    rows = {}
    for name, seconds in times.items():
        ratios = {
            f"times_{base.replace(', ', '_').replace(' ', '_')}": statistics.median(
                s / p for s, p in zip(seconds, times[base], strict=True)
            )
            for base in ("plain", "plain, moestro backend")
        }
        rows[name] = {"seconds": statistics.median(seconds), **ratios}
        table.add_row(name, f"{statistics.median(seconds):.1f}", f"{ratios['times_plain']:.2f}")
    Console().print(table)
    if options.json:
        record = {
            "date": datetime.now(UTC).isoformat(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "plain_backend": implementation,
            "tokens": batches.num_tokens,
            "rounds": options.rounds,
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
