"""Loads a checkpoint with plain transformers, in a process that never imports moestro, and writes its logits.

`python reload_plain.py CHECKPOINT CLASS INPUTS.pt LOGITS.pt`, any number of times these four.
"""

import sys

import torch
import transformers

for path, cls, inputs, logits in zip(*(iter(sys.argv[1:]),) * 4):
    model, info = getattr(transformers, cls).from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    with torch.no_grad():
        torch.save(model.eval()(**torch.load(inputs)).logits, logits)
assert not any(name.split(".")[0] == "moestro" for name in sys.modules)
