"""What steering costs while generating: greedy steps of one sequence, plain and steered, in turn in one run.

Edits act in every layer, which costs most; `one layer` in one. `routing anew, by hand` is the least that an edit of
logits must do: hooks that close an expert and re-run the family's rule. Adapting online is timed over the whole text,
its optimisation and the KV caches it rebuilds included. `after all edits`: plain again, last in a round.

python benchmarks/steer.py [--model quartet] [--rounds 11] [--json benchmarks/results/steer.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

import moestro
from moestro import ForceOn, Gain, LogitBias, SwitchOff
from moestro.steer.online_rerouting import OnlineRerouter
from moestro.steer.reroute import top_k
from moestro.steer.self_contrast import self_contrast

EDIT_LIMIT, CONTRAST_LIMIT = 1.05, 2.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quartet", help="bundled model, directory or hub name")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()

    view = moestro.open(options.model)
    ids = torch.tensor([(view.tokenizer("def main():\n    return\n")["input_ids"] * 40)[: options.prompt]])
    length = dict(max_new_tokens=options.tokens, min_new_tokens=options.tokens, do_sample=False, pad_token_id=0)
    everywhere = {(layer.index, 7) for layer in view.layers}
    bias = {layer.index: 0.01 * torch.randn(layer.num_experts) for layer in view.layers}
    edits = {
        "switch off": SwitchOff(everywhere),
        "switch off, one layer": SwitchOff({(view.layers[-1].index, 7)}),
        "gain": Gain({member: 0.5 for member in everywhere}),
        "logit bias": LogitBias(bias),
        "force on": ForceOn(everywhere),
        "two experts a token": top_k(view, 2),
    }

    def generate(processors=()) -> None:
        view.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), logits_processor=[*processors], **length
        )

    def edited(edit) -> None:
        with view.edits(edit):
            generate()

    def by_hand() -> None:
        closed = torch.tensor([7])

        def hook(layer, _, __, out):
            return tuple(layer.rule(out[0].index_fill(1, closed, float("-inf"))))

        hooks = [layer.router.register_forward_hook(partial(hook, layer)) for layer in view.layers]
        generate()
        for handle in hooks:
            handle.remove()

    def contrasted() -> None:
        with self_contrast(view) as processor:
            generate([processor])

    rerouter = OnlineRerouter(view, interval=max(options.tokens // 2, 1))
    ways = {
        "plain": generate,
        "routing anew, by hand": by_hand,
        **{name: lambda edit=edit: edited(edit) for name, edit in edits.items()},
        "self-contrast": contrasted,
        "online rerouting, two phases": lambda: rerouter.generate(ids, torch.ones_like(ids), **length),
        "after all edits": generate,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for attempt in range(options.rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if attempt:  # the first round warms up
                times[name].append((time.perf_counter() - start) / options.tokens)
    console = Console()
    table = Table("generation", "ms a step", "x plain", title=f"{options.model}, {options.tokens} tokens")
    rows = {}
    for name, seconds in times.items():
        ratio = statistics.median(s / p for s, p in zip(seconds, times["plain"]))
        rows[name] = {"milliseconds": 1000 * statistics.median(seconds), "times_plain": ratio}
        table.add_row(name, f"{rows[name]['milliseconds']:.2f}", f"{ratio:.3f}")
    console.print(table)
    for name, limit in (*((name, EDIT_LIMIT) for name in edits), ("self-contrast", CONTRAST_LIMIT)):
        met = rows[name]["times_plain"] <= limit
        console.print(f"{name}: at most {limit:g} x plain: {'met' if met else 'not met'}")
    if options.json:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "model": options.model,
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
