"""The standard router and the baselines: weights, balancing without a loss, even loads by expert choice."""

import pytest
import torch
from torch.testing import assert_close

from moestro.layers.routers import ROUTERS
from moestro.layers.routers.baselines import ExpertChoiceRouter, HashRouter, RandomRouter
from moestro.layers.routers.top_k import TopKRouter
from moestro.routing import RoutingContext, dense_weights

N, H, E, K = 64, 16, 8, 2


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, H, generator=torch.Generator().manual_seed(seed))


def loads(indices: torch.Tensor) -> torch.Tensor:
    return torch.bincount(indices[indices < E].reshape(-1), minlength=E)


def test_softmax_top_k_is_its_formula() -> None:
    router, x = TopKRouter(H, E, K), hidden()
    logits, weights, indices = router(x)
    assert_close(logits, x @ router.weight.T)
    best = logits.softmax(-1).topk(K)
    assert torch.equal(indices, best.indices)
    assert_close(weights, best.values / best.values.sum(-1, keepdim=True))
    plain = TopKRouter(H, E, K, normalize=False, scale=2.5)
    plain.weight = router.weight
    assert_close(plain(x).weights, 2.5 * best.values)
    assert_close(router.probabilities(logits).sum(-1), torch.ones(N))


def test_routing_is_fp32_under_autocast() -> None:
    router, x = TopKRouter(H, E, K), hidden()
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    assert torch.equal(routing.logits, router(x).logits)


def test_the_loss_free_bias_moves_towards_balance_and_touches_no_weight() -> None:
    router = TopKRouter(H, E, K, score="sigmoid", bias_rate=0.01).train()
    with torch.no_grad():
        router.weight[0] = 1.0  # an expert that is liked too much on positive inputs
    x = hidden().abs()
    before = loads(router(x).indices)
    assert before[0] == N
    router.slots_seen.zero_()
    router(x)
    router.after_step(0.1)
    bias = router.e_score_correction_bias
    mean = N * K / E
    assert_close(bias, 0.01 * torch.sign(mean - before.float()))
    assert bias[0] < 0
    assert not router.slots_seen.any()
    mean_load = torch.zeros(E)
    for step in range(400):
        indices = router(x).indices
        router.after_step(0.1)
        mean_load += loads(indices) / 100 if step >= 300 else 0
    assert mean_load.std() < before.float().std() / 4
    routing = router(x)
    scores = routing.logits.sigmoid().gather(1, routing.indices)
    assert_close(routing.weights, scores / scores.sum(-1, keepdim=True))


def test_padding_and_evaluation_do_not_count_for_the_bias() -> None:
    router = TopKRouter(H, E, K, score="sigmoid", bias_rate=0.05)
    mask = torch.ones(4, N // 4, dtype=torch.bool)
    mask[:, :5] = False
    router.train()(hidden(), RoutingContext(shape=(4, N // 4), mask=mask))
    assert router.slots_seen.sum() == K * mask.sum()
    router.eval()(hidden())
    assert router.slots_seen.sum() == K * mask.sum()


def test_expert_choice_is_even_in_training() -> None:
    router = ExpertChoiceRouter(H, E, K).train()
    routing = router(hidden())
    assert loads(routing.indices).tolist() == [N * K // E] * E
    dense = dense_weights(routing, E)
    scores = routing.logits.softmax(-1)
    chosen = dense > 0
    assert_close(dense[chosen], scores[chosen])
    for e in range(E):  # every expert has the tokens that it scores highest
        assert scores[chosen[:, e], e].min() >= scores[~chosen[:, e], e].max()


def test_expert_choice_leaves_padding_out_and_evaluates_token_by_token() -> None:
    router = ExpertChoiceRouter(H, E, K, momentum=0.0).train()
    mask = torch.ones(4, N // 4, dtype=torch.bool)
    mask[0] = False
    routing = router(hidden(), RoutingContext(shape=(4, N // 4), mask=mask))
    assert (routing.indices[: N // 4] == E).all()
    assert loads(routing.indices).tolist() == [48 * K // E] * E
    router.eval()
    x = hidden(1)
    assert_close(dense_weights(router(x), E)[:10], dense_weights(router(x[:10]), E))


def test_hash_and_random_routing() -> None:
    ids = torch.arange(12).view(2, 6)
    router = HashRouter(H, E, K, vocab_size=20)
    context = RoutingContext(shape=(2, 6), input_ids=ids)
    routing = router(hidden()[:12], context)
    assert torch.equal(routing.indices, router.table[:12])
    assert (routing.indices[:, 0] != routing.indices[:, 1]).all()
    assert_close(routing.weights, torch.full((12, K), 1 / K))
    with pytest.raises(ValueError, match="token ids"):
        router(hidden()[:12])
    random = RandomRouter(H, E, K).train()
    assert not torch.equal(random(hidden()).indices, random(hidden()).indices)
    random.eval()
    assert torch.equal(random(hidden()).indices, random(hidden()).indices)


@pytest.mark.parametrize("top_k", [0, 9])
def test_top_k_beyond_the_experts_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k={top_k} of 8 experts: choose between 1 and 8"):
        ROUTERS["top_k"](H, E, top_k)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bias_rate=-1: .* 0 or more"):
        TopKRouter(H, E, K, bias_rate=-1)
