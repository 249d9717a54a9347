"""Tiny checkpoints as the hub has them: quantised, and with configs in the hub's own spelling."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"


def qwen3_moe(folder: Path, **changes: Any) -> Path:
    """Plain bf16; expert matrices [72, 160], so that no block of 128 is whole at the edges."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=131, hidden_size=160, intermediate_size=136, moe_intermediate_size=72, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=96, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes | changes))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def gpt_oss(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=131, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=8, num_experts_per_tok=2, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def edit(folder: Path, *, tensors: Callable[[dict[str, Tensor]], Any] | None = None, **stated: Any) -> Path:
    """Change a checkpoint's tensors in place, and what its config states (None: no longer)."""
    if tensors is not None:
        held = load_file(folder / WEIGHTS)
        changed = tensors(held)
        save_file(held if changed is None else changed, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | stated
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def to_fp8(folder: Path, *, block: int = 128) -> Path:
    """Block FP8, written by a plain loop over blocks."""

    def change(held: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, tensor in held.items():
            if tensor.dim() != 2 or "proj" not in name:
                out[name] = tensor
                continue
            rows, cols = tensor.shape
            q, scale = (
                torch.empty_like(tensor, dtype=torch.float8_e4m3fn),
                torch.empty(-(-rows // block), -(-cols // block)),
            )
            for i in range(0, rows, block):
                for j in range(0, cols, block):
                    part = tensor[i : i + block, j : j + block].float()
                    scale[i // block, j // block] = s = part.abs().max() / 448
                    q[i : i + block, j : j + block] = (part / s).to(torch.float8_e4m3fn)
            out[name], out[f"{name}_scale_inv"] = q, scale
        return out

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [block, block]}
    return edit(folder, tensors=change, quantization_config=config)


def fp8_values(held: dict[str, Tensor], name: str, block: int = 128) -> Tensor:
    """What a stored FP8 matrix means, in fp32, element by element."""
    q, scale = held[name].float(), held[f"{name}_scale_inv"].float()
    i, j = torch.arange(q.shape[0]) // block, torch.arange(q.shape[1]) // block
    return q * scale[i][:, j]


def to_mxfp4(folder: Path) -> Path:
    """Experts with random codes, and scales that leave room in every block for other ways to say the same values."""
    generator = torch.Generator().manual_seed(1)

    def change(held: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, tensor in held.items():
            if tensor.dim() != 3:
                out[name] = tensor
                continue
            e, cols, rows = tensor.shape
            shape = (e, rows, cols // 32)
            out[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            out[f"{name}_scales"] = torch.randint(118, 123, shape, dtype=torch.uint8, generator=generator)
            out[f"{name}_blocks"][:, 0] &= 0b00110011  # a row of small codes: a larger scale would say them too
        return out

    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return edit(folder, tensors=change, quantization_config=config)


def mxfp4_values(held: dict[str, Tensor], name: str) -> Tensor:
    """What stored MXFP4 experts mean: [E, C, R] in fp32."""
    codes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor(codes + [-c for c in codes])
    blocks, scales = held[f"{name}_blocks"].long(), held[f"{name}_scales"].float()
    pairs = torch.stack([table[blocks % 16], table[blocks // 16]], dim=-1).flatten(-2)
    return (pairs * 2.0 ** (scales[..., None] - 127)).flatten(-2).transpose(1, 2)
