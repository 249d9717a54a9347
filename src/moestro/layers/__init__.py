"""Native building blocks: mixture-of-experts layers, routers, experts, losses. Plain torch modules."""

from moestro.layers.moe import MoE, after_step, gather_losses

__all__ = ["MoE", "after_step", "gather_losses"]
