#!/usr/bin/env bash
# mlx-lm leaves out the correction bias of ERNIE-4.5's router, so it routes otherwise than the model.
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
from mlx_lm.models.ernie4_5_moe import Model, ModelArgs

mx.set_default_device(mx.cpu)
sizes = dict(hidden_size=16, intermediate_size=32, max_position_embeddings=32, num_attention_heads=2, num_hidden_layers=1)
more = dict(num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=32, rope_theta=1e4, use_bias=False, moe_num_experts=4)
extra = dict(tie_word_embeddings=True, moe_intermediate_size=16, moe_k=2, moe_layer_start_index=0, moe_layer_end_index=0)
model = Model(ModelArgs(model_type="ernie4_5_moe", **sizes, **more, **extra))
name = "model.layers.0.mlp.moe_statics.e_score_correction_bias"
left = model.sanitize({name: mx.array([[0.0, 0.0, 5.0, 5.0]]), "model.norm.weight": mx.ones((16,))})
print(f"mlx-lm {version('mlx-lm')}: of {name} sanitize leaves {[k for k in left if 'bias' in k]}")
raise SystemExit(any("correction_bias" in key for key in left))
PY
