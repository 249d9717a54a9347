"""What every client script does: read its job, try each checkpoint, report. Imports nothing of moestro."""

import json
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy


def run(measure: Callable[[dict[str, Any]], Any], packages: list[str]) -> None:
    """Call `measure` with each item of the job; report its result, or the error that it ended with.

    An item may hold `ids` (an .npy file of token ids [B, T]), `path` (a checkpoint) and `logits` (where logits
    [B, T, V] go, .npy).
    """
    job, report = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = []
    for item in job["items"]:
        try:
            results.append({"result": measure(item)})
        except Exception as e:  # whatever a client says about a checkpoint is its result
            results.append({"error": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()})
    assert not any(name.split(".")[0] == "moestro" for name in sys.modules)
    report.write_text(json.dumps({"versions": {name: version(name) for name in packages}, "results": results}))


def load_ids(item: dict[str, Any]) -> numpy.ndarray:
    return numpy.load(item["ids"])


def save_logits(item: dict[str, Any], logits: Any) -> None:
    numpy.save(item["logits"], numpy.asarray(logits, dtype=numpy.float32))
