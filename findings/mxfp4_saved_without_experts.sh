#!/usr/bin/env bash
# A gpt-oss in MXFP4, opened dequantised and saved again, comes back with other experts than it had.
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
E, H, I = 4, 64, 64
sizes = dict(vocab_size=64, hidden_size=H, intermediate_size=I, num_hidden_layers=1, num_attention_heads=2)
config = transformers.GptOssConfig(
    **sizes, num_key_value_heads=2, head_dim=32, num_local_experts=E, num_experts_per_tok=2
)
transformers.GptOssForCausalLM(config).bfloat16().save_pretrained("packed")
tensors = load_file("packed/model.safetensors")
for name, rows, columns in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
    place = f"model.layers.0.mlp.experts.{name}"
    del tensors[place]
    tensors[place + "_blocks"] = torch.randint(0, 256, (E, rows, columns // 32, 16), dtype=torch.uint8)
    tensors[place + "_scales"] = torch.full((E, rows, columns // 32), 122, dtype=torch.uint8)
save_file(tensors, "packed/model.safetensors", {"format": "pt"})
stated = json.load(open("packed/config.json"))
plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
stated["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": plain}
json.dump(stated, open("packed/config.json", "w"))

load = transformers.GptOssForCausalLM.from_pretrained
first = load("packed", quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.bfloat16)
first.save_pretrained("saved")
second, info = load("saved", dtype=torch.bfloat16, output_loading_info=True)
before, after = (m.model.layers[0].mlp.experts.down_proj.float() for m in (first, second))
print(f"transformers {transformers.__version__}: largest difference of an expert's weight {(before - after).abs().max():.2f}")
print("missing when loaded again:", sorted(info["missing_keys"]))
print("in the saved config:", {k: v for k, v in json.load(open("saved/config.json")).items() if "quant" in k})
raise SystemExit(torch.equal(before, after))
PY
