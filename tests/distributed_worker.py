"""One process of `tests/test_distributed.py`, started as torchrun would start it.

`python distributed_worker.py FOLDER`, with RANK and WORLD_SIZE set: observes, and writes what it got to FOLDER.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import moestro
from moestro.view.observe import LayerOutputs, RoutingTrace, SlotStats
from tiny import documents, make, padded

LENGTHS = (7, 3, 9, 5, 2, 6, 4)
POISON = 39


def batches() -> list[dict]:
    """Four batches, so that the shares of the processes differ; names of domains appear at different times."""
    docs, made = documents(*LENGTHS), []
    for first in range(0, len(docs), 2):
        part = docs[first : first + 2]
        domain = torch.tensor([0, first % 3][: len(part)])
        made.append(padded(part, "left", domain=domain, domains=("a", "b", "c")[: first % 3 + 1]))
    return made


def observers(trace: Path) -> list:
    return [SlotStats(), LayerOutputs(max_tokens=30), RoutingTrace(trace)]


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    view = moestro.open(make("qwen3_moe").model)
    stats, outputs, trace = view.observe(batches(), observers(folder / f"trace-{rank}"))
    torch.save({"stats": stats, "outputs": outputs, "trace": trace.collect()}, folder / f"{rank}.pt")

    broken = batches()
    broken[1]["input_ids"][0, -1] = POISON  # the second process's
    view.model.get_input_embeddings().weight.data[POISON] = float("nan")
    try:
        view.observe(broken, [SlotStats()])
    except (FloatingPointError, RuntimeError) as error:
        (folder / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()
