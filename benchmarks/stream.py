"""Calibrate, prune and save an OLMoE-7B-sized checkpoint layer by layer: peak memory and time.

    python benchmarks/stream.py [--layers 16] [--tokens 8192] [--dir DIR] [--json FILE]

Writes a checkpoint of random weights (about 13.8 GB in bf16 with 16 layers), then measures, each in a process of its
own and with the files dropped from the page cache before:

    interpreter   resident memory after `import torch, transformers`
    baseline      reading the files once, and running every layer once on the calibration tokens
    streamed      moestro.open(stream=True), observe slot statistics, keep the more used half of the experts, save

Aims: peak memory <= 4 GB above the interpreter, time <= 2.5 times the baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GB = 10**9
MEMORY_AIM, TIME_AIM = 4.0, 2.5
RANDOM_NUMBERS = 1 << 26


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def make_checkpoint(path: Path, layers: int) -> int:
    """Write a random OLMoE of that many layers, a shard per layer, never whole in memory; returns its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import OlmoeConfig, OlmoeForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    config = OlmoeConfig(num_hidden_layers=layers, intermediate_size=1024, dtype="bfloat16", pad_token_id=1)
    config.architectures = ["OlmoeForCausalLM"]
    with torch.device("meta"):
        model = OlmoeForCausalLM(config).to(torch.bfloat16)
    shapes = {name: t.shape for name, t in revert_weight_conversion(model, model.state_dict()).items()}
    pool = (torch.randn(RANDOM_NUMBERS, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    shards: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(part, []).append(name)
    path.mkdir(parents=True, exist_ok=True)
    weight_map, total, at = {}, 0, 0
    for number, names in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            size, at = shapes[name].numel(), (at + 1_000_003) % (RANDOM_NUMBERS // 2)
            while at + size > RANDOM_NUMBERS and size <= RANDOM_NUMBERS // 2:
                at -= RANDOM_NUMBERS // 4
            values = pool[at : at + size] if size <= RANDOM_NUMBERS // 2 else pool.repeat(size // RANDOM_NUMBERS + 1)
            tensors[name] = (torch.ones(size).bfloat16() if "norm" in name else values[:size].clone()).view(
                shapes[name]
            )
            weight_map[name] = file
            total += tensors[name].nbytes
        save_file(tensors, path / file, metadata={"format": "pt"})
    config.save_pretrained(path)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def calibration(tokens: int, length: int = 512) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 50_000, (max(tokens // length, 1), length), generator=generator)
    return list(ids.split(2))


def run_interpreter(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    return {"peak": peak_bytes(), "torch": torch.__version__, "transformers": transformers.__version__}


def run_baseline(args: argparse.Namespace) -> dict[str, Any]:
    """Read every byte once; then run as many layers as the model has on all calibration tokens."""
    import torch
    from transformers import OlmoeConfig, OlmoeModel

    import moestro  # noqa: F401  (registers the experts backend, the fastest one here)

    buffer = bytearray(64 << 20)
    start = time.perf_counter()
    for file in sorted(args.dir.glob("original/*.safetensors")):
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    read = time.perf_counter() - start
    config = OlmoeConfig(num_hidden_layers=1, intermediate_size=1024, vocab_size=50304)
    torch.set_default_dtype(torch.bfloat16)
    model = OlmoeModel(config).eval()
    model.set_experts_implementation("moestro")
    compute = 0.0
    with torch.no_grad():
        for _ in range(args.layers):
            model.layers[0].mlp.gate.weight.normal_(std=0.02)  # each layer of a model routes in its own way
            start = time.perf_counter()
            for ids in calibration(args.tokens):
                model(input_ids=ids, use_cache=False)
            compute += time.perf_counter() - start
    return {"read": read, "compute": compute, "seconds": read + compute}


def run_streamed(args: argparse.Namespace) -> dict[str, Any]:
    import moestro
    from moestro.view.observe import SlotStats

    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name], peaks[name] = time.perf_counter() - start, peak_bytes()

    with timed("open"):
        view = moestro.open(args.dir / "original", stream=True)
    with timed("observe"):
        (statistics,) = view.observe(calibration(args.tokens), [SlotStats()])
    keep = {
        i: sorted(s.count.argsort(descending=True)[: len(s.count) // 2].tolist()) for i, s in statistics.layers.items()
    }
    view.keep_experts(keep)
    with timed("save"):
        view.save(args.dir / "pruned", overwrite=True)
    sizes = {"original": view.original_bytes, "pruned": view.num_bytes}
    return {"seconds": sum(seconds.values()), "phases": seconds, "peaks": peaks, "peak": peak_bytes(), **sizes}


PARTS = {"interpreter": run_interpreter, "baseline": run_baseline, "streamed": run_streamed}


def drop_from_cache(directory: Path) -> None:
    for file in directory.rglob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def in_process(part: str, args: argparse.Namespace) -> dict[str, Any]:
    drop_from_cache(args.dir)
    command = [sys.executable, __file__, "--part", part, "--layers", str(args.layers)]
    command += ["--tokens", str(args.tokens), "--dir", str(args.dir)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--dir", type=Path, help="where to put the checkpoints (22 GB with 16 layers)")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--keep-files", action="store_true")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps({**PARTS[args.part](args), "cpu_seconds": time.process_time()}))
        return
    made = args.dir is None
    args.dir = args.dir or Path(tempfile.mkdtemp(prefix="moestro-stream-"))
    try:
        if not (args.dir / "original" / "model.safetensors.index.json").is_file():
            make_checkpoint(args.dir / "original", args.layers)
        results = {part: in_process(part, args) for part in PARTS}
    finally:
        if not args.keep_files:
            for name in ("original", "pruned"):
                shutil.rmtree(args.dir / name, ignore_errors=True)
            if made:
                shutil.rmtree(args.dir, ignore_errors=True)
    streamed, baseline = results["streamed"], results["baseline"]
    above = streamed["peak"] - results["interpreter"]["peak"]
    ratio = streamed["seconds"] / baseline["seconds"]
    phases = ", ".join(f"{name} {s:.0f} s" for name, s in streamed["phases"].items())
    print(f"checkpoint   {streamed['original'] / GB:.1f} GB -> {streamed['pruned'] / GB:.1f} GB, {args.layers} layers")
    print(f"baseline     read {baseline['read']:.0f} s + compute {baseline['compute']:.0f} s ({args.tokens} tokens)")
    print(f"streamed     {streamed['seconds']:.0f} s: {phases}")
    print(f"time         {ratio:.2f} x baseline (aim <= {TIME_AIM})")
    cpu = streamed["cpu_seconds"] / baseline["cpu_seconds"]
    print(f"processor    {streamed['cpu_seconds']:.0f} s, {cpu:.2f} x baseline (where other work disturbs the clock)")
    print(f"peak memory  {above / GB:.2f} GB above the interpreter (aim <= {MEMORY_AIM})")
    if args.json:
        settings = {"layers": args.layers, "tokens": args.tokens, "cpus": os.cpu_count()}
        numbers = {"gb_above_interpreter": above / GB, "times_baseline": ratio}
        args.json.write_text(json.dumps({**settings, **numbers, **results}, indent=1))


if __name__ == "__main__":
    main()
