#!/usr/bin/env bash
# mlx-lm skips DeepSeek-V3's next-token-prediction layer by the number 61: at another depth its weights are left over.
# Seen with mlx-lm 0.32.2. Exits 1 where that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/mlx"
"$work/mlx/bin/pip" install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/mlx/bin/python" -W ignore - <<'PY'
from importlib.metadata import version
import mlx.core as mx
from mlx_lm.models.deepseek_v3 import Model, ModelArgs

mx.set_default_device(mx.cpu)
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, moe_intermediate_size=16, num_attention_heads=2)
heads = dict(num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=4, qk_nope_head_dim=4)
experts = dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1)
model = Model(ModelArgs(num_hidden_layers=2, first_k_dense_replace=2, **sizes, **heads, **experts))
left = {n: n in model.sanitize({n: mx.zeros((4,))}) for n in (f"model.layers.{i}.enorm.weight" for i in (2, 61))}
print(f"mlx-lm {version('mlx-lm')}, 2 decoder layers: kept for loading {left}")
raise SystemExit(left != {"model.layers.2.enorm.weight": True, "model.layers.61.enorm.weight": False})
PY
