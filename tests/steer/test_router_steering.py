"""Router steering: on every style of routing, the edited logits go through the family's own selection."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import moestro
import tiny
from moestro import SwitchOff
from moestro.steer.router_steering import HardActivate, HardSuppress, SoftSteer, open_std
from moestro.steer.steering import Steering

DOCS = tiny.documents(9, 4, 7)
BATCH = tiny.padded(DOCS)
SOFT = {"strength": 0.7}


@pytest.fixture(params=tiny.LEARNED)
def view(request: pytest.FixtureRequest):
    return moestro.open(tiny.make(request.param).model)


def routings(view, edit=None) -> dict[int, tuple[Tensor, Tensor]]:
    """{layer: (indices, weights)} that its experts were given."""
    with tiny.watching_experts(view) as calls, view.edits(*([] if edit is None else [edit])):
        tiny.logits_of(view.model, BATCH)
    return {layer: seen[0][1:] for layer, seen in calls.items()}


def raw_logits(view, layer: int) -> Tensor:
    """What the first MoE layer's router computes: nothing before it is steered."""
    seen: list[Tensor] = []
    hook = view.layer(layer).router.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    tiny.logits_of(view.model, BATCH)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).float()


def by_hand(view, layer: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """(indices, weights) of logits z, written out for each family."""
    router, config = view.layer(layer).router, view.model.config
    if config.model_type == "qwen3_moe":
        p = z.softmax(-1)
        weights, indices = p.topk(config.num_experts_per_tok)
        return indices, weights / weights.sum(-1, keepdim=True)
    if config.model_type == "gpt_oss":
        chosen, indices = z.topk(config.num_experts_per_tok)
        return indices, chosen.softmax(-1)
    assert config.model_type == "deepseek_v3"
    p = z.sigmoid()
    choice = p + router.e_score_correction_bias
    groups = choice.view(len(z), config.n_group, -1)
    best = groups.topk(2).values.sum(-1).topk(config.topk_group).indices
    open_ = torch.zeros(groups.shape[:2]).scatter(1, best, 1).bool()
    indices = groups.masked_fill(~open_[..., None], 0).flatten(1).topk(config.num_experts_per_tok).indices
    weights = p.gather(1, indices)
    return indices, weights / weights.sum(-1, keepdim=True) * config.routed_scaling_factor


EQUATIONS: dict[str, tuple[Callable, Callable]] = {
    "soft": (lambda experts: SoftSteer(experts, **SOFT), lambda z, e: z[:, e] + SOFT["strength"] * z.std(1)[:, None]),
    "away": (lambda experts: SoftSteer(experts, strength=-1), lambda z, e: z[:, e] - z.std(1)[:, None]),
    "hard": (HardActivate, lambda z, e: z.amax(1, keepdim=True) + 1e-5),
    "suppress": (HardSuppress, lambda z, e: z.amin(1, keepdim=True) - 1e-5),
}


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_routing_is_that_of_the_equation(family: str, name: str) -> None:
    view = moestro.open(tiny.make(family).model)
    make, equation = EQUATIONS[name]
    layer = view.layers[0].index
    z = raw_logits(view, layer)
    experts = [3] if name == "hard" else [3, 5]
    edited = z.clone()
    edited[:, experts] = equation(z, experts)
    indices, weights = by_hand(view, layer, edited)
    got_indices, got_weights = routings(view, make({(layer, e) for e in experts}))[layer]
    dense = torch.zeros(len(z), 8).scatter(1, indices, weights)
    got = torch.zeros(len(z), 8).scatter(1, got_indices.long(), got_weights.float())
    torch.testing.assert_close(got, dense, rtol=1e-4, atol=1e-5)
    plain = torch.zeros(len(z), 8).scatter(1, *by_hand(view, layer, z))
    assert not torch.allclose(got, plain, atol=1e-3)


def test_every_family_uses_steered_experts_more_or_less(view) -> None:
    layer = view.layers[0].index
    chosen = {(layer, 3), (layer, 6)}

    def use(edit=None) -> int:
        indices, weights = routings(view, edit)[layer]
        return int((((indices == 3) | (indices == 6)) & (weights != 0)).sum())

    assert use(HardSuppress(chosen)) <= use(SoftSteer(chosen, strength=-1)) < use()
    assert use() < use(SoftSteer(chosen, strength=1)) <= use(HardActivate(chosen))


def test_an_activated_expert_serves_every_token_and_two_share_the_weight() -> None:
    view = moestro.open(tiny.make("qwen3_moe").model)
    layer = view.layers[-1].index
    indices, weights = routings(view, HardActivate({(layer, 3), (layer, 6)}))[layer]
    indices, weights = indices[BATCH["attention_mask"].flatten() == 1], weights[BATCH["attention_mask"].flatten() == 1]
    took_both = (indices.sort(1).values == torch.tensor([3, 6])).all(1)
    assert took_both.any()
    torch.testing.assert_close(weights[took_both], torch.full((int(took_both.sum()), 2), 0.5))
    assert not took_both.all(), "the token's own best ties with them"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_are_broken_at_random_the_same_way_each_time(dtype: torch.dtype) -> None:
    view = moestro.open(tiny.make("qwen3_moe").model.to(dtype))
    layer = view.layers[0].index
    everyone = {(layer, e) for e in range(8)}
    with pytest.warns(UserWarning, match="8 experts of layer 1 are activated, and a token uses top_k=2"):
        first = routings(view, HardActivate(everyone))[layer][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again, other = (routings(view, HardActivate(everyone, seed=s))[layer][0] for s in (0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique()) >= 7


def test_steering_acts_in_both_phases_of_generation_and_is_gone_afterwards(view) -> None:
    layer, hooks = view.layers[-1].index, tiny.hooks_on(view.model)
    state = tiny.state_of(view.model)
    expert = 3 if view.model.config.model_type != "deepseek_v3" else int(routings(view)[layer][0][0, 0])

    def fail() -> None:
        with view.edits(HardSuppress({(layer, expert)})):
            view.model.generate(DOCS[0][None], max_new_tokens=4, do_sample=False, pad_token_id=0)
            raise KeyError

    with tiny.watching_experts(view) as calls, pytest.raises(KeyError):
        fail()
    sizes = [len(indices) for _, indices, _ in calls[layer]]
    assert sizes == [9, 1, 1, 1]
    assert all((((indices == expert) & (weights != 0)).sum() == 0) for _, indices, weights in calls[layer])
    assert tiny.hooks_on(view.model) == hooks
    assert tiny.same_state(view.model, state)


def test_rows_are_steered_alone() -> None:
    view = moestro.open(tiny.make("qwen3_moe").model)
    chosen = {(layer.index, 3) for layer in view.layers}
    plain = tiny.logits_of(view.model, BATCH)
    with view.edits(SoftSteer(chosen, strength=1.0)):
        whole = tiny.logits_of(view.model, BATCH)
    with view.edits(SoftSteer(chosen, strength=1.0, rows=[1])):
        one = tiny.logits_of(view.model, BATCH)
    torch.testing.assert_close(one[[0, 2]], plain[[0, 2]], **tiny.FP32)
    torch.testing.assert_close(one[1], whole[1], **tiny.FP32)
    assert not torch.allclose(one[1], plain[1], atol=1e-3)


def test_closed_experts_stay_closed_and_do_not_count() -> None:
    view = moestro.open(tiny.make("qwen3_moe").model)
    layer = view.layers[0].index
    for edit in (SoftSteer({(layer, 3)}, strength=1.0), HardActivate({(layer, 3)}), HardSuppress({(layer, 2)})):
        with tiny.watching_experts(view) as calls, view.edits(SwitchOff({(layer, 3), (layer, 4)}), edit):
            assert torch.isfinite(tiny.logits_of(view.model, BATCH)).all()
        assert not torch.isin(calls[layer][0][1], torch.tensor([3, 4])).any()
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    closed = torch.cat([z, torch.full((5, 2), float("-inf"))], dim=1)
    torch.testing.assert_close(open_std(closed), z.std(dim=1))
    assert open_std(closed[:, -3:]).tolist() == [0] * 5


def test_setups_are_saved_and_steer_alike(tmp_path) -> None:
    view = moestro.open(tiny.make("qwen3_moe").model)
    edits = (SoftSteer({(1, 3)}, strength=-0.25), HardActivate({(2, 1)}, seed=4), HardSuppress({(2, 0), (1, 1)}))
    with view.edits(*edits):
        steered = tiny.logits_of(view.model, BATCH)
    assert not torch.equal(steered, tiny.logits_of(view.model, BATCH))
    with Steering.load(Steering.of(view, *edits).save(tmp_path / "s.json")).on(view):
        assert torch.equal(tiny.logits_of(view.model, BATCH), steered)


def test_impossible_requests_are_refused() -> None:
    view = moestro.open(tiny.make("qwen3_moe").model)
    for edit in (SoftSteer, HardActivate, HardSuppress):
        with pytest.raises(ValueError, match=f"{edit.__name__}: the set of experts is empty"):
            edit(frozenset())
        with pytest.raises(ValueError, match="decoder layer 0 has no experts"), view.edits(edit({(0, 1)})):
            pass
        with pytest.raises(ValueError, match="there is no expert 8"), view.edits(edit({(1, 8)})):
            pass
    with pytest.raises(ValueError, match="strength=nan"):
        SoftSteer({(1, 1)}, strength=float("nan"))
    with pytest.warns(UserWarning, match="strength=1.5 is beyond the stable range"):
        SoftSteer({(1, 1)}, strength=1.5)
    looked_up = moestro.open(tiny.make("deepseek_v4").model)
    hashed = looked_up.layers[0].index
    with pytest.raises(ValueError, match="cannot be re-run"), looked_up.edits(SoftSteer({(hashed, 1)})):
        pass
