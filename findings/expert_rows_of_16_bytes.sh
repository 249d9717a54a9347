#!/usr/bin/env bash
# The default experts backend raises for an expert width whose rows are no multiple of 16 bytes; the eager one computes it.
# Seen with transformers 5.23.0 with torch 2.13.0 on a CPU. Exits 1 where that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/five"
"$work/five/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/five/bin/python" -W ignore - <<'PY'
import torch, transformers

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
outcome = {}
for width in (24, 20, 18):
    config = transformers.Qwen3MoeConfig(
        **sizes, num_key_value_heads=2, moe_intermediate_size=width, num_local_experts=4, num_experts_per_tok=2
    )
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    for backend in ("default", "eager"):
        if backend == "eager":
            model.set_experts_implementation("eager")
        try:
            with torch.no_grad():
                model(torch.arange(1, 9)[None])
            outcome[width, backend] = "runs"
        except RuntimeError as e:
            outcome[width, backend] = str(e).splitlines()[0][:90]
print(f"transformers {transformers.__version__}, torch {torch.__version__}, bf16:")
for (width, backend), said in outcome.items():
    print(f"  expert width {width} ({2 * width} bytes a row), {backend}: {said}")
runs = {key: said == "runs" for key, said in outcome.items()}
raise SystemExit(not all(runs[w, "eager"] for w in (24, 20, 18)) or not runs[24, "default"] or runs[20, "default"])
PY
