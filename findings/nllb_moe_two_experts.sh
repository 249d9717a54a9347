#!/usr/bin/env bash
# NLLB-MoE computes experts 0 and 1 alone, whatever its router chose: the others' weights change nothing.
# Seen with transformers 5.23.0. Exits 1 where that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/five"
"$work/five/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/five/bin/python" -W ignore - <<'PY'
import torch, transformers
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

torch.manual_seed(0)
config = transformers.NllbMoeConfig(d_model=16, num_experts=8, encoder_ffn_dim=16, second_expert_policy="all")
layer = NllbMoeSparseMLP(config, ffn_dim=16).eval()
hidden = torch.randn(1, 64, 16)


def output():
    with torch.no_grad():
        found = layer(hidden)
    return found[0] if isinstance(found, tuple) else found


def without(expert):
    saved = {name: p.detach().clone() for name, p in expert.named_parameters()}
    for p in expert.parameters():
        p.data.zero_()
    changed = not torch.equal(output(), before)
    for name, p in expert.named_parameters():
        p.data.copy_(saved[name])
    return changed


before = output()
with torch.no_grad():
    wanted = layer.router.classifier(hidden.reshape(-1, 16)).topk(2).indices.unique().tolist()
children = [layer.experts[name] for name in layer.experts] if hasattr(layer.experts, "keys") else list(layer.experts)
used = [i for i, expert in enumerate(children) if without(expert)]
print(f"transformers {transformers.__version__}: the router's top two are {wanted}, zeroing an expert changes the output for {used}")
raise SystemExit(used != [0, 1] or len(wanted) <= 2)
PY
