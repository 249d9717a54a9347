"""A causal language model assembled from names in its config: router, experts, layers that are sparse, residual rule.

Everything but the feed-forward part is Qwen3's: pre-norm, rotary positions, grouped-query attention with normed
queries and keys. With the standard top-k router the model equals transformers' Qwen3-MoE.

    config = MoELMConfig(num_hidden_layers=6, num_experts=32, num_experts_per_tok=4, router="top_k")
    model = MoELMForCausalLM(config)

Shapes: B batch, T sequence, N = B * T tokens, H hidden, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from moestro.layers import MoE, gather_losses
from moestro.layers.experts import EXPERTS
from moestro.layers.experts.feed_forward import FeedForwardExperts
from moestro.layers.kinds import Kind, make, named
from moestro.layers.linear import Linear
from moestro.layers.momentum import AdamFirst, HeavyBall, RobustMomentum
from moestro.layers.norm import RMSNorm
from moestro.layers.routers import ROUTERS, Router
from moestro.models.attention import NAME as BLOCKED_CAUSAL
from moestro.models.attention import Attention
from moestro.models.head import next_token_loss
from moestro.models.monet import build_monet
from moestro.models.routing_cache import RoutingCache, with_memory
from moestro.models.union_of_experts import build_selective, build_union
from moestro.routing import RoutingContext


class MoELMConfig(Qwen3MoeConfig):
    """Sizes as in Qwen3MoeConfig, and what the layers are made of.

    block: the feed-forward part of the sparse layers, a name in BLOCKS; "moe" is router + experts.
    router, experts: names in ROUTERS and EXPERTS. residual: a name in RESIDUALS. attention: a name in ATTENTIONS.
    moe_layers: numbers of the sparse layers; None for all. The others are dense, `intermediate_size` wide.
    shared_intermediate_size: width of the shared expert; 0 for none.
    router_losses: {name in LOSSES: coefficient or options}.
    fused_loss: where labels are given, the loss is computed without keeping logits, which are None then: faster.
    """

    model_type = "moestro_lm"

    block: Kind = "moe"
    router: Kind = "top_k"
    experts: Kind = "gated"
    residual: Kind = "plain"
    attention: Kind = "full"
    moe_layers: list[int] | None = None
    shared_intermediate_size: int = 0
    router_losses: dict[str, Any] | None = None
    fused_loss: bool = False
    norm_topk_prob: bool = True
    __no_type_check__ = True  # configs take any further keyword; jaxtyping's check of dataclasses would refuse it

    def __post_init__(self, **kwargs: Any) -> None:
        self.moe_layers = list(range(self.num_hidden_layers)) if self.moe_layers is None else list(self.moe_layers)
        if unknown := [i for i in self.moe_layers if not 0 <= i < self.num_hidden_layers]:
            raise ValueError(f"moe_layers names layer {unknown[0]}; there are {self.num_hidden_layers}")
        super().__post_init__(**kwargs)


class FeedForward(nn.Module):
    """A dense SwiGLU layer; also the shared expert."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, hidden: Tensor, context: RoutingContext | None = None) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


Common = dict[str, nn.Module]
"""Modules that several layers of one model share, by name; the layer that is built first puts them in."""


def build_moe(config: MoELMConfig, layer: int, common: Common) -> MoE:
    """Router, experts and shared expert of one layer, as the config names them."""
    make_experts, expert_options = named(EXPERTS, config.experts, "experts")
    experts = make_experts(
        config.num_experts, config.hidden_size, config.moe_intermediate_size, config=config, **expert_options
    )
    width = config.shared_intermediate_size
    shared = FeedForward(config.hidden_size, width) if width else None
    return MoE(build_router(config, config.num_experts, common), experts, shared, losses=config.router_losses)


def build_router(config: MoELMConfig, num_experts: int, common: Common) -> Router:
    """The router that the config names, for a layer of `num_experts`.

    A router whose arguments include `vocab_size`, `normalize` or `common` (see Common) is given them.
    """
    make_router, options = named(ROUTERS, config.router, "router")
    offered = {"vocab_size": config.vocab_size, "common": common, "normalize": config.norm_topk_prob}
    sizes = config.hidden_size, num_experts, config.num_experts_per_tok
    return make(make_router, *sizes, options=options, offered=offered)


BLOCKS: dict[str, Callable[..., nn.Module]] = {"moe": build_moe, "monet": build_monet, "union": build_union}
"""Feed-forward parts of sparse layers: (config, layer, common, **options) -> module called with (hidden, context)."""

ATTENTIONS: dict[str, Callable[..., nn.Module]] = {"full": Attention, "selective": build_selective}
"""Attention modules: (config, layer, **options) -> module called as transformers' Qwen3MoeAttention is."""


class PlainResidual(nn.Module):
    """x + v."""

    def __init__(self, config: MoELMConfig, layer: int):
        super().__init__()

    def forward(self, x: Tensor, v: Tensor, context: RoutingContext) -> Tensor:
        return x + v


RESIDUALS: dict[str, Callable[..., nn.Module]] = {
    "plain": PlainResidual,
    "heavy_ball": lambda config, layer, **options: HeavyBall(**options),
    "adam_first": lambda config, layer, **options: AdamFirst(**options),
    "robust_momentum": lambda config, layer, **options: RobustMomentum(**options),
}
"""How a sparse block's output joins the stream: (config, layer, **options) -> module called with (x, v, context).

One with a method `at(x, context)` says where the block looks in the place of x.
"""


class DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward part, each behind a norm. Routing state and memory go in and come out by value.

    Under gradient checkpointing, the routers' losses are outputs too, and all of these are tensors by position: what
    lies in a dict or on a module loses its gradient where the checkpoint is reentrant.
    """

    def __init__(self, config: MoELMConfig, layer: int, common: Common):
        super().__init__()
        self.index = layer
        make_attention, attention_options = named(ATTENTIONS, config.attention, "attention")
        self.self_attn = make_attention(config, layer, **attention_options)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        make_residual, residual_options = named(RESIDUALS, config.residual, "residual")
        if layer in (config.moe_layers or ()):
            make_block, block_options = named(BLOCKS, config.block, "block")
            self.mlp = make_block(config, layer, common, **block_options)
            self.residual = make_residual(config, layer, **residual_options)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size)
            self.residual = PlainResidual(config, layer)

    def run(
        self, hidden: Tensor, state: dict[str, Tensor], context: RoutingContext, **attention: Any
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor] | None]:
        """(hidden states, routing state, memory) behind the layer."""
        hidden, names, *values = self(hidden, context, tuple(state), *state.values(), **attention)
        states, memories, losses = names
        tensors = iter(values)
        state = {name: next(tensors) for name in states}
        memory = None if memories is None else {name: next(tensors) for name in memories}
        for module, its in losses:
            self.get_submodule(module).losses = {name: next(tensors) for name in its}  # type: ignore[assignment]
        return hidden, state, memory

    def forward(
        self, hidden: Tensor, context: RoutingContext, names: tuple[str, ...], *values: Tensor, **attention: Any
    ) -> tuple[Any, ...]:
        """Hidden states, the names of what follows, and then tensors: routing state, memory, losses."""
        state = dict(zip(names, values, strict=True))
        checkpointed = self.gradient_checkpointing and self.training
        former = {n: m.losses for n, m in self.named_modules() if hasattr(m, "losses")} if checkpointed else {}
        attended, weights = self.self_attn(self.input_layernorm(hidden), **attention)
        hidden = hidden + attended
        memory = None if context.memory is None else dict(context.memory)
        here = replace(context, layer=self.index, state=state, attentions=weights, memory=memory)
        at = self.residual.at(hidden, here) if hasattr(self.residual, "at") else hidden  # type: ignore[operator]
        out = self.residual(hidden, self.mlp(self.post_attention_layernorm(at), here), here)
        now: dict[str, Any] = {name: self.get_submodule(name).losses for name in former}
        left = {name: losses for name, losses in now.items() if losses is not former[name]}
        told = (
            tuple(here.state),
            None if here.memory is None else tuple(here.memory),
            tuple((n, tuple(losses)) for n, losses in left.items()),
        )
        parts = (here.state, here.memory or {}, *left.values())
        return (out, told, *(tensor for part in parts for tensor in part.values()))


class MoELMPreTrainedModel(PreTrainedModel):
    config_class = MoELMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(Router, index=0),
        "hidden_states": DecoderLayer,
        "attentions": OutputRecorder(Qwen3MoeAttention, index=1),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        return super().get_correct_attn_implementation(requested_attention or BLOCKED_CAUSAL, is_init_check)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or "moestro")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "reset_parameters") and isinstance(module, Router | FeedForwardExperts):
            module.reset_parameters(self.config.initializer_range)


class MoELMModel(MoELMPreTrainedModel):
    """Token ids to hidden states [B, T, H].

    `token_labels`: {"modality", "task", ...: labels [B, T]}, for routers that look at them.
    """

    def __init__(self, config: MoELMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        common: Common = {}
        self.layers = nn.ModuleList([DecoderLayer(config, i, common) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Qwen3MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.progress = 1.0
        """Share of the training that is done; a trainer sets it, and it reaches the routers in the context."""
        self._tied_weights_keys = _shared_parameters(self)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """What layers share stays shared, also where input and output embeddings are not tied."""
        return dict(self._tied_weights_keys or {})

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        token_labels: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = RoutingCache(config=self.config)
        past_key_values = with_memory(past_key_values)
        rows, length = inputs_embeds.shape[:2]
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(before, before + length, device=inputs_embeds.device)[None]
        make_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        attention = dict(
            attention_mask=make_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            ),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=self.rotary_emb(inputs_embeds, position_ids=position_ids),
        )
        mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
        context = RoutingContext(
            shape=(rows, length),
            mask=None if mask is None else mask[:, -length:].bool(),
            input_ids=input_ids,
            labels=token_labels or {},
            start=int(before),
            progress=self.progress,
        )
        hidden: Tensor = inputs_embeds
        state: dict[str, Tensor] = {}
        past = past_key_values if isinstance(past_key_values, RoutingCache) else None
        for i, layer in enumerate(self.layers):
            here = context if past is None else replace(context, memory=past.remembered(i))
            hidden, state, memory = layer.run(hidden, state, here, **attention, **kwargs)  # type: ignore[operator]
            if past is not None:
                past.remember(i, memory)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class MoELMForCausalLM(MoELMPreTrainedModel, GenerationMixin):
    """The language model. In training mode the loss includes the routers' losses, also given as `aux_loss`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MoELMConfig):
        super().__init__(config)
        self.model = MoELMModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        fused = labels is not None and self.config.fused_loss
        logits = None if fused else self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        losses = list(gather_losses(self.model).values()) if self.training else []
        aux_loss = torch.stack(losses).sum() if losses else None
        loss = None
        if labels is not None:
            items = kwargs.get("num_items_in_batch")
            if items is not None and aux_loss is not None:  # of a batch that comes in parts: weigh as this part does
                aux_loss = aux_loss * (labels[..., 1:] != -100).sum() / items
            if fused:
                loss, _ = next_token_loss(hidden, self.lm_head.weight, labels, num_items_in_batch=items)
            else:
                loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            loss = loss if aux_loss is None else loss + aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """{name: name under which it came first} of parameters that several layers share; files store them once."""
    first: dict[Tensor, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in named if first.setdefault(p, name) != name}


AutoConfig.register("moestro_lm", MoELMConfig)
AutoModel.register(MoELMConfig, MoELMModel)
AutoModelForCausalLM.register(MoELMConfig, MoELMForCausalLM)
