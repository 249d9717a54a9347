#!/usr/bin/env bash
# A Qwen3-MoE config that transformers 5.23 saves says neither num_experts nor rope_theta; 4.57 then builds 128 experts and rope 10000.
# Seen with transformers 5.23.0, read by 4.57.6. Exits 1 where that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/five"
"$work/five/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
python3 -m venv "$work/four"
"$work/four/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==4.57.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/five/bin/python" -W ignore - <<'PY'
import json, transformers

rope = {"rope_type": "default", "rope_theta": 1e6}
transformers.Qwen3MoeConfig(num_local_experts=8, num_experts_per_tok=2, rope_parameters=rope).save_pretrained("saved")
stated = json.load(open("saved/config.json"))
print(f"transformers {transformers.__version__} wrote", {k: v for k, v in stated.items() if "rope" in k or "experts" in k})
raise SystemExit("num_experts" in stated or "rope_theta" in stated)
PY
cd "$work"
HF_HUB_OFFLINE=1 "$work/four/bin/python" -W ignore - <<'PY'
import transformers

config = transformers.AutoConfig.from_pretrained("saved")
print(f"transformers {transformers.__version__} reads num_experts={config.num_experts}, rope_theta={config.rope_theta}")
raise SystemExit((config.num_experts, config.rope_theta) != (128, 10000.0))
PY
