#!/usr/bin/env bash
# A block-FP8 checkpoint opens dequantised, and save_pretrained of it raises.
# Seen with transformers 5.23.0. Exits 1 where that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/five"
"$work/five/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/five/bin/python" -W ignore - <<'PY'
import json, torch, transformers
from safetensors.torch import load_file, save_file

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=128, moe_intermediate_size=128, num_hidden_layers=1)
config = transformers.Qwen3MoeConfig(
    **sizes, num_attention_heads=4, num_key_value_heads=4, head_dim=32, num_local_experts=4, num_experts_per_tok=2
)
transformers.Qwen3MoeForCausalLM(config).bfloat16().save_pretrained("fp8")
tensors = {}
for name, tensor in load_file("fp8/model.safetensors").items():
    tensors[name] = tensor
    if tensor.dim() == 2 and "proj" in name:
        scale = float(tensor.float().abs().max()) / 448
        tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.full((tensor.shape[0] // 128, tensor.shape[1] // 128), scale)
save_file(tensors, "fp8/model.safetensors", {"format": "pt"})
stated = json.load(open("fp8/config.json"))
stated["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"} | {
    "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]
}
json.dump(stated, open("fp8/config.json", "w"))
quantization = transformers.FineGrainedFP8Config(dequantize=True, modules_to_not_convert=["lm_head", "model.layers.0.mlp.gate"])
model = transformers.Qwen3MoeForCausalLM.from_pretrained("fp8", quantization_config=quantization, dtype=torch.bfloat16)
with torch.no_grad():
    print("dequantised, it computes:", tuple(model(torch.arange(8)[None]).logits.shape))
try:
    model.save_pretrained("saved")
    said = ""
except Exception as e:
    said = f"{type(e).__name__}: {e}"
print(f"transformers {transformers.__version__}, save_pretrained: {said or 'saved'}")
raise SystemExit(not said)
PY
