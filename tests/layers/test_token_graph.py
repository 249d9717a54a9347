"""Token-graph routers: what they mix, what they may look at, and that decoding step by step changes nothing."""

import copy
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import DynamicCache, StaticCache

import moestro
from moestro.analyze.fluctuation import routing_fluctuation
from moestro.layers.routers import token_graph
from moestro.layers.routers.token_graph import (
    AttentionAwareRouter,
    SimilarityAwareRouter,
    TokenGraphRouter,
    UniformGraphRouter,
)
from moestro.layers.routers.top_k import TopKRouter
from moestro.models.lm import MoELMForCausalLM
from moestro.models.routing_cache import RoutingCache
from moestro.routing import RoutingContext, dense_weights
from moestro.view.observe import RoutingTrace
from native_lm import check_generates, check_observed, check_trains, small_lm, token_ids

B, T, H, E, K = 2, 9, 12, 6, 2
KINDS = {"similarity": SimilarityAwareRouter, "attention": AttentionAwareRouter, "uniform": UniformGraphRouter}
ROUTERS: dict[str, Any] = {
    "similarity": "similarity_aware",
    "low rank": {"kind": "similarity_aware", "rank": 4, "neighbours": 5, "temperature": 0.5},
    "logits": {"kind": "similarity_aware", "mix": "logits", "rho": 0.7, "rank": 0},
    "attention": "attention_aware",
    "uniform": "uniform_graph",
}
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9], dtype=torch.bool)


def make(kind: str, **options: Any) -> TokenGraphRouter:
    router = KINDS[kind](H, E, K, **options)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.bias)
    return router


def attentions(mask: torch.Tensor | None = None) -> torch.Tensor:
    scores = torch.randn(B, 3, T, T, generator=torch.Generator().manual_seed(5))
    allowed = (
        torch.ones(T, T, dtype=torch.bool).tril()
        if mask is None
        else mask[:, None, None] & torch.ones(T, T).tril().bool()
    )
    return scores.masked_fill(~allowed, -1e9).softmax(dim=-1)


def context(mask: torch.Tensor | None = None, **more: Any) -> RoutingContext:
    return RoutingContext((B, T), mask=mask, attentions=attentions(mask), **more)


def lm(router: Any, **config: Any) -> MoELMForCausalLM:
    return small_lm(router=router, attn_implementation="eager", **config).eval()


def test_mixture_is_the_papers_sum() -> None:
    hidden = torch.randn(B * T, H)
    u = hidden.view(B, T, H)
    causal = torch.ones(T, T).tril().bool()
    s = {
        "similarity": (u @ u.mT / H**0.5 / 0.7).masked_fill(~causal, float("-inf")).softmax(dim=-1),
        "attention": attentions().mean(dim=1),
        "uniform": (causal / causal.sum(dim=1, keepdim=True)).expand(B, T, T),
    }
    for kind, parents in s.items():
        router = make(kind, **({"temperature": 0.7} if kind == "similarity" else {}))
        r = (u @ router.weight.T + router.bias).softmax(dim=-1)
        routing = router(hidden, context())
        mixed = (parents @ r).view(-1, E)
        torch.testing.assert_close(router.probabilities(routing.logits), mixed)
        best = mixed.topk(K, dim=-1)
        assert torch.equal(routing.indices, best.indices)
        torch.testing.assert_close(routing.weights, best.values / best.values.sum(dim=-1, keepdim=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", ["probs", "logits"])
def test_rho_0_is_the_plain_router(kind: str, mix: str) -> None:
    router, plain, hidden = make(kind, rho=0.0, mix=mix), TopKRouter(H, E, K), torch.randn(B * T, H)
    torch.nn.init.zeros_(router.bias)
    plain.weight = router.weight
    for mask in (None, MASK):
        torch.testing.assert_close(
            dense_weights(router(hidden, context(mask)), E), dense_weights(plain(hidden), E), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_padding_counts_for_nothing_and_padding_itself_falls_back(kind: str) -> None:
    router, hidden = make(kind), torch.randn(B * T, H)
    changed = hidden.clone()
    changed[:2] += 5
    one, other = router(hidden, context(MASK)), router(changed, context(MASK))
    torch.testing.assert_close(one.logits[2:], other.logits[2:])
    own = (changed[:2] @ router.weight.T + router.bias).softmax(dim=-1)
    torch.testing.assert_close(other.logits[:2].exp(), own)


@pytest.mark.parametrize("kind", ["similarity", "uniform"])
def test_no_token_looks_ahead_unless_told_to(kind: str) -> None:
    hidden = torch.randn(B * T, H)
    later = hidden.view(B, T, H).clone()
    later[:, 5:] = torch.randn(B, T - 5, H)
    for causal in (True, False):
        router = make(kind, causal=causal)
        one = router(hidden, context()).logits.view(B, T, E)[:, :5]
        other = router(later.flatten(0, 1), context()).logits.view(B, T, E)[:, :5]
        assert torch.allclose(one, other, atol=1e-5) == causal


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_s_sum_to_1_over_allowed_positions(kind: str) -> None:
    router, hidden = make(kind), torch.randn(B, T, H)
    kept = {"gate": torch.zeros(B, T, E), **router.keys(hidden)}
    allowed = MASK[:, None] & torch.ones(T, T).tril().bool()
    s = router.parents(hidden, kept, allowed, slice(0, T), context(MASK))
    torch.testing.assert_close(s.sum(dim=-1), allowed.any(dim=-1).float())
    assert (s[~allowed] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    router, hidden = make(kind), torch.randn(B * T, H)
    whole = router(hidden, context(MASK)).logits
    monkeypatch.setattr(token_graph, "CHUNK", 4)
    torch.testing.assert_close(router(hidden, context(MASK)).logits, whole)


def test_neighbours_are_the_most_similar_and_a_cold_similarity_takes_one() -> None:
    router, hidden = make("similarity", neighbours=1), torch.randn(B * T, H)
    u = hidden.view(B, T, H)
    best = (u @ u.mT).masked_fill(~torch.ones(T, T).tril().bool(), float("-inf")).argmax(dim=-1)
    r = (u @ router.weight.T + router.bias).softmax(dim=-1)
    expected = r.gather(1, best[..., None].expand(-1, -1, E)).view(-1, E)
    torch.testing.assert_close(router(hidden, context()).logits.exp(), expected)
    cold = make("similarity", temperature=1e-6)
    cold.load_state_dict(router.state_dict())
    torch.testing.assert_close(cold(hidden, context()).logits.exp(), expected, rtol=1e-4, atol=1e-4)
    assert cold(hidden.bfloat16(), context()).logits.isfinite().all()


def test_averaging_does_not_lower_the_mean_entropy_of_fixed_distributions() -> None:
    """Concavity: what the docstring warns of."""
    router, hidden = make("similarity"), torch.randn(B * T, H)
    own = (hidden @ router.weight.T + router.bias).softmax(dim=-1).view(B, T, E)
    allowed = torch.ones(B, T, T).tril().bool()
    s = router.parents(hidden.view(B, T, H), router.keys(hidden.view(B, T, H)), allowed, slice(0, T), context())
    mixed = torch.special.entr(router(hidden, context()).logits.exp()).sum(dim=-1).view(B, T)
    assert (mixed + 1e-5 >= (s @ torch.special.entr(own).sum(dim=-1)[..., None])[..., 0]).all()


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_in_a_language_model(router: Any, tmp_path: Path) -> None:
    model = lm(router, router_losses={"load_balance": 0.01})
    check_trains(model)
    check_generates(model)
    check_observed(model)
    model.save_pretrained(tmp_path)
    again = MoELMForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_a_cache_filled_in_pieces_gives_the_logits_of_the_whole(router: Any) -> None:
    model, ids = lm(router), token_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        cache, parts, seen = None, [], 0
        for piece in ids.split([5, 1, 1, 3, 2], dim=1):
            seen += piece.shape[1]
            out = model(piece, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_beams_take_their_memory_along(router: Any) -> None:
    model, prompt = lm(router), token_ids(2, 6)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    how: dict[str, Any] = dict(attention_mask=mask, num_beams=4, max_new_tokens=8, do_sample=False, pad_token_id=0)
    fast = model.generate(prompt, use_cache=True, **how)
    assert torch.equal(fast, model.generate(prompt, use_cache=False, **how))


def test_memory_follows_rows_and_positions() -> None:
    model, ids = lm("similarity_aware"), token_ids(3, 8)

    def rest(cache: RoutingCache, rows: torch.Tensor, start: int) -> torch.Tensor:
        return model(rows[:, start:], past_key_values=cache, use_cache=True).logits

    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        filled = model(ids[:, :6], use_cache=True).past_key_values
        one = copy.deepcopy(filled)
        one.reorder_cache(torch.tensor([2, 0, 0]))
        torch.testing.assert_close(rest(one, ids[[2, 0, 0]], 6), whole[[2, 0, 0], 6:], rtol=1e-4, atol=1e-4)
        one = copy.deepcopy(filled)
        one.batch_repeat_interleave(2)
        torch.testing.assert_close(
            rest(one, ids.repeat_interleave(2, 0), 6), whole[:, 6:].repeat_interleave(2, 0), rtol=1e-4, atol=1e-4
        )
        one = copy.deepcopy(filled)
        one.batch_select_indices(torch.tensor([1]))
        torch.testing.assert_close(rest(one, ids[1:2], 6), whole[1:2, 6:], rtol=1e-4, atol=1e-4)
        one = copy.deepcopy(filled)
        one.crop(-3)
        torch.testing.assert_close(rest(one, ids, 3), whole[:, 3:], rtol=1e-4, atol=1e-4)
        one.reset()
        torch.testing.assert_close(rest(one, ids, 0), whole, rtol=1e-4, atol=1e-4)


def test_a_cache_that_was_filled_without_memory_is_refused() -> None:
    model, ids = lm("similarity_aware"), token_ids(1, 6)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)  # keys and values land in it, the memory in what is returned
    with pytest.raises(ValueError, match="6 positions are cached and this router knows 0"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    static = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(ids, past_key_values=static, use_cache=True)
        with pytest.raises(ValueError, match="6 positions are cached"):
            model(ids[:, :1], past_key_values=static, use_cache=True)


def test_routers_refuse() -> None:
    hidden = torch.randn(B * T, H)
    with pytest.raises(ValueError, match="needs a RoutingContext"):
        make("similarity")(hidden)
    with pytest.raises(ValueError, match="is for 4 tokens; the router was given 18"):
        make("similarity")(hidden, RoutingContext((1, 4)))
    with pytest.raises(ValueError, match="attn_implementation"):
        make("attention")(hidden, RoutingContext((B, T)))
    with pytest.raises(ValueError, match="causal=False"):
        make("uniform", causal=False)(hidden, context(start=T, memory={"gate": torch.zeros(B, T, E)}))
    for wrong in (dict(rho=1.5), dict(mix="sum"), dict(temperature=0.0), dict(rank=99), dict(neighbours=0)):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            SimilarityAwareRouter(H, E, K, **wrong)


def trace(model: MoELMForCausalLM, ids: torch.Tensor) -> pl.LazyFrame:
    return moestro.open(model).observe([ids], [RoutingTrace(logits=False)], progress=False)[0]


def test_fluctuation_counts_tokens_whose_experts_change() -> None:
    model, ids = lm("top_k"), token_ids()
    one = trace(model, ids)
    assert routing_fluctuation(one, one) == {0: 0.0, 1: 0.0}
    with torch.no_grad():
        router = model.model.layers[1].mlp.router
        router.weight.copy_(router.weight.flip(0))  # every expert is another now
    other = trace(model, ids)
    assert routing_fluctuation(one, other, by="top1")[0] == 0
    assert routing_fluctuation(one, other, by="top1")[1] == 1
    assert 0 < routing_fluctuation(one, other)[1] <= 1
    assert routing_fluctuation(one, other, where=pl.col("position") < 3)[0] == 0


def test_fluctuation_ignores_order_and_unused_slots() -> None:
    def frame(experts: list[list[int]], weights: list[list[float]]) -> pl.LazyFrame:
        rows, slots = len(experts), len(experts[0])
        return pl.LazyFrame(
            {"layer": [0] * rows, "sample": [0] * rows, "position": list(range(rows)), "id": [7] * rows}
        ).with_columns(
            pl.Series("experts", experts, dtype=pl.Array(pl.Int16, slots)),
            pl.Series("weights", weights, dtype=pl.Array(pl.Float32, slots)),
        )

    one = frame([[0, 1], [2, 3], [4, 5]], [[0.6, 0.4], [0.6, 0.4], [1.0, 0.0]])
    other = frame([[1, 0, 9], [3, 1, 9], [4, 2, 9]], [[0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [1.0, 0.0, 0.0]])
    assert routing_fluctuation(one, other) == {0: pytest.approx(1 / 3)}
    assert routing_fluctuation(one, other, by="top1") == {0: pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="3 and 2 rows"):
        routing_fluctuation(one, other.filter(pl.col("position") < 2))
    with pytest.raises(ValueError, match="'top3' is not known"):
        routing_fluctuation(one, other, by="top3")
