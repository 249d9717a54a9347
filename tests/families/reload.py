"""Reloads saved checkpoints with plain transformers, in a process of its own, and compares their logits.

`python reload.py ROOT FAMILY...`: ROOT/FAMILY is a checkpoint, ROOT/FAMILY.pt holds inputs and expected logits. The
last line printed is JSON: {family: "" or what went wrong}.
"""

import json
import sys
from pathlib import Path

import torch
import transformers


def problem(root: Path, family: str) -> str:
    expected = torch.load(root / f"{family}.pt")
    (name,) = transformers.AutoConfig.from_pretrained(root / family).architectures
    cls = getattr(transformers, name, None)
    if cls is None:  # a few classes are not exported at the top
        import importlib

        folder = family.partition("+")[0]
        modelling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        cls = getattr(modelling, name)
    model, info = cls.from_pretrained(root / family, output_loading_info=True)
    wrong = {kind: sorted(keys) for kind, keys in info.items() if keys and kind != "error_msgs"}
    if wrong:
        return f"loading: {wrong}"
    with torch.no_grad():
        logits = model.eval()(**expected["inputs"]).logits
    difference = (logits - expected["logits"]).abs().max().item()
    return "" if difference <= 1e-4 else f"logits differ by {difference:.2g}"


if __name__ == "__main__":
    root, families = Path(sys.argv[1]), sys.argv[2:]
    outcome = {}
    for family in families:
        try:
            outcome[family] = problem(root, family)
        except Exception as error:
            outcome[family] = f"{type(error).__name__}: {error}"
    assert not any(name.split(".")[0] == "moestro" for name in sys.modules)
    print(json.dumps(outcome))
