"""What every router, expert kind or block must do inside the language model that is assembled from names."""

from pathlib import Path
from typing import Any

import torch

import moestro
from moestro.models.lm import MoELMConfig, MoELMForCausalLM
from moestro.view.observe import ExpertCounts

SMALL: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=48,
    moe_intermediate_size=24,
    num_experts=8,
    num_experts_per_tok=2,
    tie_word_embeddings=True,
)


def small_lm(**config: Any) -> MoELMForCausalLM:
    torch.manual_seed(0)
    return MoELMForCausalLM(MoELMConfig(**{**SMALL, "initializer_range": 0.2, **config}))


def token_ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def gradients(model: MoELMForCausalLM, ids: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """Gradients of the loss, routers' losses included, in training mode."""
    model.train()
    model.zero_grad()
    torch.manual_seed(seed)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_trains(model: MoELMForCausalLM) -> None:
    """Every parameter gets a finite gradient, and gradient checkpointing gives the same."""
    ids = token_ids()
    plain = gradients(model, ids)
    assert all(g.isfinite().all() for g in plain.values())
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, ids)
    model.activation_checkpointing_disable()
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def check_generates(model: MoELMForCausalLM) -> None:
    """Greedy decoding with the KV cache follows the arg-max of the full forward."""
    model.eval()
    ids = token_ids(length=5)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        full = model(input_ids=out, use_cache=False).logits.argmax(dim=-1)
    assert torch.equal(out[:, 5:], full[:, 4:-1])


def check_round_trip(model: MoELMForCausalLM, path: Path) -> None:
    """Saved and loaded, the model computes the same."""
    model.eval()
    model.save_pretrained(path)
    again = MoELMForCausalLM.from_pretrained(path).eval()
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def check_observed(model: MoELMForCausalLM) -> Any:
    """The model opens, and an observer sees every slot that routers fill; returns the view."""
    view = moestro.open(model.eval())
    (counts,) = view.observe([token_ids()], [ExpertCounts()], progress=False)
    assert set(counts) == {layer.index for layer in view.layers}
    assert all(table.sum() > 0 for table in counts.values())
    return view
