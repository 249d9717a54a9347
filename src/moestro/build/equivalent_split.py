"""A dense feed-forward layer, an attention or a whole language model cut into experts that add up to exactly that.

    y = act(x W1 + b1) W2 + b2 = sum over e of act(x W1[:, e] + b1[e]) W2[e, :]  + b2       (F / E neurons each)
    attention = sum over heads of softmax(q_h k_h^T) v_h W_o[h, :]

A gated layer's gate and up matrices are cut together; heads that share key and value make one expert; output biases are
added once. With every expert chosen for every token the result is the dense model, up to rounding: it is the start from
which some can be left out.

Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer (arXiv:2503.02495).
Shapes: E experts, F neurons of the dense layer, H hidden.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.layers.experts.feed_forward import GatedExperts, UngatedExperts
from moestro.models.lm import MoELMConfig, MoELMForCausalLM
from moestro.models.union_of_experts import Constant, SelectiveAttention

IN = ("fc1", "c_fc", "up_proj", "dense_h_to_4h", "wi")
OUT = ("fc2", "c_proj", "down_proj", "dense_4h_to_h", "wo")
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
LARGEST_DIFFERENCE = 1e-3
"""Of the logits on random tokens, in fp32, relative to the largest: more is no rounding."""


class BiasedExperts(UngatedExperts):
    """Ungated experts with biases: `up_proj_bias` [E, I], `down_proj_bias` [E, H]."""

    has_bias = True
    expert_axes: ClassVar = {"up_proj": 0, "up_proj_bias": 0, "down_proj": 0, "down_proj_bias": 0}

    def __init__(self, num_experts: int, hidden_size: int, width: int, **options: Any):
        super().__init__(num_experts, hidden_size, width, **options)
        self.up_proj_bias = nn.Parameter(torch.zeros(num_experts, width))
        self.down_proj_bias = nn.Parameter(torch.zeros(num_experts, hidden_size))


class Union(nn.Module):
    """All experts on all tokens, added up: the dense layer. `experts` and `shared` are ready for a `MoE`."""

    def __init__(self, experts: Any, shared: nn.Module | None):
        super().__init__()
        self.experts: Any = experts
        self.shared = shared

    def forward(self, hidden: Float[Tensor, "... h"]) -> Float[Tensor, "... h"]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        everyone = torch.arange(self.experts.num_experts, device=flat.device).expand(len(flat), -1)
        out = self.experts(flat, everyone, torch.ones_like(everyone, dtype=flat.dtype))
        return (out if self.shared is None else out + self.shared(flat)).view_as(hidden)


@torch.no_grad()
def split_ffn(mlp: nn.Module, num_experts: int) -> Union:
    """The layer as `num_experts` slices. `mlp`: gate_proj, up_proj, down_proj; or two linear layers.

    Raises ValueError where the slices would not be equally wide, or the layer is of another make.
    """
    children = dict(mlp.named_children())
    act: Any = next((children[n] for n in ACTIVATIONS if n in children), None)
    act = act or next((getattr(mlp, n) for n in ACTIVATIONS if callable(getattr(mlp, n, None))), None)
    gated = isinstance(getattr(mlp, "gate_proj", None), nn.Linear)
    up: Any = next((children[n] for n in IN if isinstance(children.get(n), nn.Linear)), None)
    down: Any = next((children[n] for n in OUT if isinstance(children.get(n), nn.Linear)), None)
    linears = sum(isinstance(m, nn.Linear) for m in mlp.modules())
    others = sum(p.numel() for p in mlp.parameters()) - sum(
        p.numel() for m in mlp.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)
    )
    if up is None or down is None or linears != 2 + gated or others:
        raise ValueError(f"{type(mlp).__name__} is not a plain or gated feed-forward layer of linear maps: {children}")
    if act is None and gated and type(mlp).__module__ == "moestro.models.lm":
        act = nn.SiLU()
    if act is None:
        raise ValueError(f"{type(mlp).__name__} does not say its activation under {', '.join(ACTIVATIONS)}")
    width = up.out_features
    if num_experts < 1 or width % num_experts:
        raise ValueError(f"{num_experts} experts do not divide the layer's {width} neurons")
    sizes = num_experts, up.in_features, width // num_experts
    rows = up.weight.unflatten(0, (num_experts, -1))
    if gated:
        gate: Any = mlp.gate_proj
        if gate.bias is not None or up.bias is not None:
            raise ValueError(f"{type(mlp).__name__} has biases on its gate or input: gated experts have none")
        experts: Any = GatedExperts(*sizes)
        experts.gate_up_proj.copy_(torch.cat([gate.weight.unflatten(0, (num_experts, -1)), rows], dim=1))
    else:
        experts = (UngatedExperts if up.bias is None else BiasedExperts)(*sizes)
        experts.up_proj.copy_(rows)
        if up.bias is not None:
            experts.up_proj_bias.copy_(up.bias.view(num_experts, -1))
            experts.down_proj_bias.zero_()
    experts.act_fn = act
    experts.down_proj.copy_(down.weight.unflatten(1, (num_experts, -1)).transpose(0, 1))
    shared = None
    if down.bias is not None:
        shared = Constant(down.out_features)
        shared.bias.copy_(down.bias)
    return Union(experts.to(up.weight), shared if shared is None else shared.to(up.weight))


@torch.no_grad()
def split_attention(attention: nn.Module, config: Any, **selection: Any) -> SelectiveAttention:
    """The attention with its groups of heads as experts; `selection` goes to SelectiveAttention, all are chosen unless
    it says otherwise.

    Raises ValueError for norms across heads and anything else that the heads share: their parts would not add up.
    """
    parameters = {n.rpartition(".")[0] or n for n, _ in attention.named_parameters()}
    unknown = sorted(parameters - {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})
    if unknown:
        raise ValueError(f"{type(attention).__name__} has {unknown[0]}, which is not known to split by head")
    given: Any = attention
    normed = getattr(given, "q_norm", None) is not None
    if normed and given.q_norm.weight.numel() != config.head_dim:
        raise ValueError(
            f"{type(attention).__name__} norms its queries over {given.q_norm.weight.numel()} numbers, heads have "
            f"{config.head_dim}: a norm across heads does not split"
        )
    biases = [getattr(given, n).bias is not None for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
    options = {"select": "own", "weighting": "none"} | selection
    split: Any = SelectiveAttention(config, given.layer_idx, norm=normed, bias=any(biases), **options)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        ours, theirs = getattr(split, name), getattr(given, name)
        ours.weight.copy_(theirs.weight)
        if ours.bias is not None:
            ours.bias.zero_() if theirs.bias is None else ours.bias.copy_(theirs.bias)
    if normed:
        split.q_norm.weight.copy_(given.q_norm.weight)
        split.k_norm.weight.copy_(given.k_norm.weight)
    return split.to(given.q_proj.weight)


@torch.no_grad()
def split_language_model(
    dense: Any,
    num_experts: int,
    *,
    block: dict[str, Any] | None = None,
    attention: dict[str, Any] | None = None,
) -> MoELMForCausalLM:
    """A dense model of Qwen3's make as a union of experts, every one chosen; gates are drawn.

    block, attention: options of the "union" block and the "selective" attention, to leave experts out afterwards
    (`top_k`, `select`, ...); those of `block` may hold `top_k` too. The equality is checked on random tokens.

    Raises ValueError where the dense model is of another make, which shows in its logits.
    """
    config = dense.config
    if config.intermediate_size % num_experts:
        raise ValueError(f"{num_experts} experts do not divide the model's {config.intermediate_size} neurons")
    whole: dict[str, Any] = {"select": "own", "weighting": "none"}
    made = MoELMConfig(
        **{name: getattr(config, name) for name in SIZES if hasattr(config, name)},
        num_experts=num_experts,
        num_experts_per_tok=num_experts,
        moe_intermediate_size=config.intermediate_size // num_experts,
        block={"kind": "union", **whole},
        attention={
            "kind": "selective",
            **whole,
            "norm": hasattr(dense.model.layers[0].self_attn, "q_norm"),
            "bias": getattr(config, "attention_bias", False),
        },
    )
    model: Any = MoELMForCausalLM(made).to(dense.device, dense.dtype)
    theirs = dense.state_dict()
    ours = {n: t for n, t in theirs.items() if ".mlp." not in n}
    missing, unexpected = model.load_state_dict(ours, strict=False)
    lost = [n for n in missing if ".mlp." not in n and ".gate." not in n] + unexpected
    if lost and not (made.tie_word_embeddings and lost == ["lm_head.weight"]):
        raise ValueError(
            f"{type(dense).__name__} and a union of experts differ in {lost[0]}: it is not of Qwen3's make"
        )
    for one, other in zip(dense.model.layers, model.model.layers, strict=True):
        split = split_ffn(one.mlp, num_experts)
        other.mlp.experts.load_state_dict(split.experts.state_dict())
    _check_equal(dense, model)
    model.generation_config = copy.deepcopy(dense.generation_config)
    made.num_experts_per_tok = (block or {}).get("top_k", num_experts)
    changes = {k: v for k, v in (block or {}).items() if k != "top_k"}
    if block is None and attention is None:
        return model.eval()
    made.block = made.block | changes  # type: ignore[operator]
    made.attention = made.attention | (attention or {})  # type: ignore[operator]
    chosen: Any = MoELMForCausalLM(made).to(dense.device, dense.dtype)
    chosen.load_state_dict(model.state_dict())
    chosen.generation_config = model.generation_config
    return chosen.eval()


def _check_equal(dense: Any, model: Any) -> None:
    ids = torch.randint(0, dense.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    ids = ids.to(dense.device)
    modes = dense.training, model.training
    expected, got = (m.eval()(input_ids=ids, use_cache=False).logits.float() for m in (dense, model))
    dense.train(modes[0])
    model.train(modes[1])
    difference = float((expected - got).abs().max() / expected.abs().max())
    limit = LARGEST_DIFFERENCE if dense.dtype == torch.float32 else 0.05
    if not difference <= limit:
        raise ValueError(
            f"the union's logits differ from {type(dense).__name__}'s by {difference:.2g} of the largest: it computes "
            "something that Qwen3's layers do not"
        )
