"""`python -m moestro.train.recipe`: build the bundled models quartet and solo from scratch.

Steps, in order: `corpus` (fetch the sources, build labelled documents), `tokens` (tokenizer, packed rows), `sample`
(the embedded sample, from documents that are never trained on), `quartet` and `solo` (training; each resumes from its
checkpoint), `export` (weights, measurements, model cards).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

import moestro
from moestro.train import packing
from moestro.train.corpus import Document, build
from moestro.train.export import export_all, fresh_model
from moestro.train.pretrain import TOKENS, plan_of, start_training
from moestro.train.sample import write_parallel, write_sample
from moestro.train.tokenizer import load_or_train

PACKAGE = Path(moestro.__file__).parent
POOL_TOKENS = 40_000_000  # rows on disk; a plan trains on the first of them
HELD_OUT_ROWS = 40  # per domain
STEPS = ("corpus", "tokens", "sample", "quartet", "solo", "export")

app = typer.Typer(add_completion=False, help=__doc__)


def corpus_step(work: Path) -> None:
    """Documents to `work/corpus.jsonl`, parallel strings to `work/parallel.jsonl`."""
    documents, phrases = build(work / "sources")
    with open(work / "corpus.jsonl", "w", encoding="utf-8") as file:
        for d in documents:
            file.write(json.dumps([d.text, d.domain, d.split], ensure_ascii=False) + "\n")
    with open(work / "parallel.jsonl", "w", encoding="utf-8") as file:
        for phrase in phrases:
            file.write(json.dumps({"en": phrase.english, **phrase.translations}, ensure_ascii=False) + "\n")
    print(f"corpus: {len(documents)} documents, {len(phrases)} parallel strings")


def read_corpus(work: Path) -> list[Document]:
    """The documents that `corpus` wrote."""
    with open(work / "corpus.jsonl", encoding="utf-8") as file:
        return [Document(*json.loads(line)) for line in file]


def tokens_step(work: Path) -> None:
    """Train the tokenizer; pack training and held-out rows."""
    documents = read_corpus(work)
    tokenizer = load_or_train(work / "tokenizer", documents)
    rows_of = packing.training_rows(POOL_TOKENS)
    for split, counts in (("heldout", dict.fromkeys(rows_of, HELD_OUT_ROWS)), ("train", rows_of)):
        part = [d for d in documents if (d.split == "train") == (split == "train")]
        tokens, domain = packing.pack(part, tokenizer, counts, seed=0)
        packing.write_rows(work, split, packing.Rows(tokens, domain, list(rows_of)))
        print(f"{split}: {tokens.size:,} tokens in {len(tokens):,} rows")


def sample_step(work: Path) -> None:
    """The embedded sample and the parallel strings, written into the package."""
    folder = PACKAGE / "data" / "sample"
    write_sample(folder, read_corpus(work), load_or_train(work / "tokenizer", []))
    with open(work / "parallel.jsonl", encoding="utf-8") as file:
        write_parallel(folder / "parallel" / "strings.jsonl.gz", map(json.loads, file))
    size = sum(path.stat().st_size for path in folder.rglob("*.gz"))
    print(f"sample: {size / 1e6:.2f} MB in {folder}")


def training_step(kind: str, work: Path, tokens: int) -> None:
    """Train one model, from its checkpoint where there is one."""
    plan = plan_of(kind, tokens)
    model = fresh_model(kind, load_or_train(work / "tokenizer", []), seed=plan.seed)
    rows, heldout = (packing.read_rows(work, split) for split in ("train", "heldout"))
    start_training(kind, model, rows, heldout, plan, work / kind).run()


@app.command()
def main(
    steps: Annotated[
        list[str] | None, typer.Argument(help=f"steps to run, of {', '.join(STEPS)}; all when none")
    ] = None,
    work: Annotated[Path, typer.Option(help="downloads, tokens, checkpoints and logs")] = Path("runs"),
    tokens: Annotated[int, typer.Option(help="training tokens per model")] = TOKENS,
    threads: Annotated[int, typer.Option(help="CPU threads of a training")] = 2,
) -> None:
    """Run the chosen steps."""
    chosen = steps or list(STEPS)
    unknown = sorted(set(chosen) - set(STEPS))
    if unknown:
        raise typer.BadParameter(f"no step {unknown[0]!r}; the steps are {', '.join(STEPS)}")
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    if "corpus" in chosen:
        corpus_step(work)
    if "tokens" in chosen:
        tokens_step(work)
    if "sample" in chosen:
        sample_step(work)
    for kind in ("quartet", "solo"):
        if kind in chosen:
            training_step(kind, work, tokens)
    if "export" in chosen:
        export_all(work, PACKAGE / "bundled", load_or_train(work / "tokenizer", []))


if __name__ == "__main__":
    app()
