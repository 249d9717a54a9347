#!/usr/bin/env bash
# DeepSeek-V3's router chooses experts of closed groups once scores plus correction biases are negative.
# Seen with transformers 4.57.6 and mlx-lm 0.32.2 (transformers 5.23.0 is right). Exits 1 where that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/four"
"$work/four/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==4.57.6
python3 -m venv "$work/five"
"$work/five/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
python3 -m venv "$work/mlx"
"$work/mlx/bin/pip" install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/four/bin/python" -W ignore - <<'PY'
import torch, transformers
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

# 8 experts in 2 groups, 1 group open; the scores of the first four experts are the best, all biases are -2.
sizes = dict(vocab_size=64, hidden_size=8, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1)
heads = dict(num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=4)
experts = dict(n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=0)
config = transformers.DeepseekV3Config(**sizes, **heads, **experts, qk_nope_head_dim=4)
router = DeepseekV3ForCausalLM(config).model.layers[0].mlp.gate.eval()
with torch.no_grad():
    router.weight.zero_()
    router.weight[:, 0] = torch.tensor([4.0, 3, 2, 1, -1, -2, -3, -4])
    router.e_score_correction_bias.fill_(-2.0)
hidden = torch.zeros(1, 1, 8)
hidden[..., 0] = 1.0
with torch.no_grad():
    chosen = next(found for found in router(hidden) if not found.is_floating_point())
ids = sorted(chosen.flatten().tolist())
print(f"transformers {transformers.__version__}: best group is 0-3, chosen are experts {ids}")
raise SystemExit(ids == [0, 1])
PY
cd "$work"
HF_HUB_OFFLINE=1 "$work/five/bin/python" -W ignore - <<'PY'
import torch, transformers
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

# 8 experts in 2 groups, 1 group open; the scores of the first four experts are the best, all biases are -2.
sizes = dict(vocab_size=64, hidden_size=8, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1)
heads = dict(num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=4)
experts = dict(n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=0)
config = transformers.DeepseekV3Config(**sizes, **heads, **experts, qk_nope_head_dim=4)
router = DeepseekV3ForCausalLM(config).model.layers[0].mlp.gate.eval()
with torch.no_grad():
    router.weight.zero_()
    router.weight[:, 0] = torch.tensor([4.0, 3, 2, 1, -1, -2, -3, -4])
    router.e_score_correction_bias.fill_(-2.0)
hidden = torch.zeros(1, 1, 8)
hidden[..., 0] = 1.0
with torch.no_grad():
    chosen = next(found for found in router(hidden) if not found.is_floating_point())
ids = sorted(chosen.flatten().tolist())
print(f"transformers {transformers.__version__}: best group is 0-3, chosen are experts {ids}")
raise SystemExit(ids != [0, 1])
PY
cd "$work"
HF_HUB_OFFLINE=1 "$work/mlx/bin/python" -W ignore - <<'PY'
from importlib.metadata import version
import mlx.core as mx
from mlx_lm.models.deepseek_v3 import group_expert_select

mx.set_default_device(mx.cpu)
logits = mx.array([[4.0, 3, 2, 1, -1, -2, -3, -4]])
ids, _ = group_expert_select(logits, mx.full((8,), -2.0), 2, 2, 1, 1.0, True)
ids = sorted(ids.flatten().tolist())
print(f"mlx-lm {version('mlx-lm')}: best group is 0-3, chosen are experts {ids}")
raise SystemExit(ids == [0, 1])
PY
