"""A two-layer attention-only model built by hand, which goes on as a text went on before: ... A B ... A -> B.

The residual stream has four parts: the token [V], the token before it [V], the position [P], and the logits [V].
Head (0, 0) looks one token back and writes what it finds there into "the token before". Heads (1, 0) and (1, 1) look
where the token before is the present one and write that place's token into the logits, with weights 1 and 1/4. All
other heads look at the first token and write nothing. There are no norms and no MLPs, so every effect is known.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

V, P, HEADS = 24, 40, 3
WEIGHTS = (1.0, 0.25)
SHARP = 30.0
TOKEN, BEFORE, PLACE, OUT = slice(0, V), slice(V, 2 * V), slice(2 * V, 2 * V + P), slice(2 * V + P, 3 * V + P)
WIDTH = 3 * V + P
D = V + P  # of a head


class CopyConfig(PreTrainedConfig):
    model_type = "copy_by_hand"


class Attention(nn.Module):
    is_causal = True

    def __init__(self, config: CopyConfig, index: int, sharp: float):
        super().__init__()
        self.config, self.layer_idx = config, index
        self.num_key_value_groups, self.scaling = 1, 1.0
        q, k, v, o = (torch.zeros(HEADS, *shape) for shape in ((WIDTH, D), (WIDTH, D), (WIDTH, D), (D, WIDTH)))
        one, at = torch.eye(V), torch.eye(P)
        if index == 0:
            q[0, PLACE, V:], k[0, PLACE, V:] = sharp * at.roll(-1, dims=1), at
            q[0, PLACE.start, V:] = sharp * at[0]  # the first token looks at itself
            v[0, TOKEN, :V], o[0, :V, BEFORE] = one, one
        else:
            for head, weight in enumerate(WEIGHTS):
                q[head, TOKEN, :V], k[head, BEFORE, :V] = sharp * one, one
                v[head, TOKEN, :V], o[head, :V, OUT] = one, weight * one
        for head in range(2 * index or 1, HEADS):
            q[head, PLACE, V], k[head, PLACE.start, V] = sharp, 1.0
        self.q, self.k, self.v, self.o = (nn.Parameter(w) for w in (q, k, v, o))

    def forward(self, hidden: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        q, k, v = (torch.einsum("bth,ahd->batd", hidden, w) for w in (self.q, self.k, self.v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        z, _ = attention(self, q, k, v, mask, scaling=self.scaling, dropout=0.0)
        return torch.einsum("btad,adh->bth", z, self.o)


class CopyPreTrained(PreTrainedModel):
    config_class = CopyConfig
    _supports_sdpa = True
    main_input_name = "input_ids"

    def _init_weights(self, module: nn.Module) -> None:
        pass


class CopyStack(CopyPreTrained):
    def __init__(self, config: CopyConfig, sharp: float = SHARP):
        super().__init__(config)
        self.layers = nn.ModuleList(Attention(config, i, sharp) for i in range(2))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        rows, length = input_ids.shape
        position = torch.arange(before, before + length)
        hidden = torch.zeros(rows, length, WIDTH)
        hidden[:, :, TOKEN] = nn.functional.one_hot(input_ids, V).float()
        hidden[:, :, PLACE] = nn.functional.one_hot(position, P).float()
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position[None],
        )
        for layer in self.layers:
            hidden = hidden + layer(hidden, mask, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)


class CopyModel(CopyPreTrained, GenerationMixin):
    def __init__(self, config: CopyConfig, sharp: float = SHARP):
        super().__init__(config)
        self.model = CopyStack(config, sharp)
        self.post_init()

    def forward(self, input_ids: Tensor, logits_to_keep: Any = 0, **more: Any) -> CausalLMOutputWithPast:
        out = self.model(input_ids, **more)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=out.last_hidden_state[:, kept, OUT], past_key_values=out.past_key_values)


def copy_model(sharp: float = SHARP) -> CopyModel:
    return CopyModel(CopyConfig(num_hidden_layers=2, hidden_size=WIDTH, vocab_size=V), sharp).eval()
