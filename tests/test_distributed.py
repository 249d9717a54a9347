"""Observing with two processes gives, on each of them, what one process gets."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.testing import assert_close

import moestro
from distributed_worker import batches, observers
from tiny import make

WORKER = Path(__file__).parent / "distributed_worker.py"


def test_two_processes_get_what_one_gets(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, tmp_path],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    view = moestro.open(make("qwen3_moe").model)
    stats, outputs, trace = view.observe(batches(), observers(tmp_path / "alone"))
    try:
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], errors

    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found["stats"].tokens == stats.tokens
        for layer, slots in stats.layers.items():
            ours = found["stats"].layers[layer]
            assert torch.equal(ours.count, slots.count)
            for name in ("gate_sum", "norm_sum", "gated_norm_sum"):
                assert_close(getattr(ours, name), getattr(slots, name), rtol=1e-12, atol=0)
            values, tokens = found["outputs"][layer]
            assert torch.equal(values, outputs[layer][0])
            for field in ("sample", "position", "id"):
                assert torch.equal(getattr(tokens, field), getattr(outputs[layer][1], field))
        assert found["trace"].equals(trace.collect())

    # A process that fails is named on the others, which would otherwise wait for it.
    assert "FloatingPointError: NaN router logits in layer 1" in (tmp_path / "1.error").read_text()
    assert "RuntimeError: process 1 failed while observing: FloatingPointError" in (tmp_path / "0.error").read_text()
