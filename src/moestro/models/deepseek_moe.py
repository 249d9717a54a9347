"""DeepSeekMoE: many small experts and a few that are always on, at unchanged parameters and cost.

Start from a plain mixture of N experts of width I, K of which serve a token. Split every expert into m of width I / m,
and set S of the mN aside as shared experts that every token passes, with weight 1:

    E = mN - S routed experts, K' = mK - S of them for a token, width I / m
    s = softmax(W u) over the routed experts alone;  g_e = s_e where e is among the K' best, else 0 (not normalised)
    h = u + shared(u) + sum_e g_e expert_e(u)          shared: one SwiGLU of width S I / m

"DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models" (arXiv:2401.06066).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moestro.models.lm import MoELMConfig

INITIAL_STD = 0.006  # of all parameters, in the paper


def segment(num_experts: int, top_k: int, width: int, *, m: int, shared: int = 0) -> dict[str, int]:
    """Config entries of the segmented layer, with the parameters, total and active, of the plain one given.

    segment(16, 2, I, m=4, shared=1): 63 routed experts of width I / 4, 7 of them active, and one that is shared. The
    paper keeps one shared for three active ones. Raises ValueError for what cannot be split so.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} of {num_experts} experts: choose between 1 and {num_experts}")
    if m < 1 or width % m:
        raise ValueError(f"experts of width {width} cannot be split into m={m}; choose a divisor")
    if not 0 <= shared < m * top_k:
        raise ValueError(
            f"shared={shared} of the m * top_k = {m * top_k} active experts leaves none to route; choose 0 to "
            f"{m * top_k - 1}"
        )
    return dict(
        num_experts=m * num_experts - shared,
        num_experts_per_tok=m * top_k - shared,
        moe_intermediate_size=width // m,
        shared_intermediate_size=shared * width // m,
    )


def deepseek_moe(
    num_experts: int,
    top_k: int,
    width: int,
    *,
    m: int = 4,
    shared: int = 1,
    first_dense: int = 0,
    balance: float = 0.01,
    device_balance: float = 0.0,
    groups: Sequence[Sequence[int]] | None = None,
    **config: Any,
) -> MoELMConfig:
    """The language model's config: `segment`, gate weights as they are, and the balance losses.

    first_dense: the first layers stay dense (the larger models keep one so, whose balance would converge slowly).
    balance, device_balance: coefficients of the losses over experts and over the groups of experts that share a device.
    """
    losses: dict[str, Any] = {"expert_balance": balance} if balance else {}
    if device_balance:
        if groups is None:
            raise ValueError(f"device_balance={device_balance} needs groups: the routed experts of each device")
        losses["device_balance"] = {"coef": device_balance, "groups": [list(group) for group in groups]}
    made = MoELMConfig(
        **{
            **segment(num_experts, top_k, width, m=m, shared=shared),
            "norm_topk_prob": False,
            "router_losses": losses or None,
            "initializer_range": INITIAL_STD,
            **config,
        }
    )
    made.moe_layers = list(range(first_dense, made.num_hidden_layers))
    return made
