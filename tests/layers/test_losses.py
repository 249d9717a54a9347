"""Balance and bounding losses: 1 when even, more when not, and padding never counts."""

import pytest
import torch
from torch.testing import assert_close

from moestro.layers.losses import LOSSES, device_balance, expert_balance, load_balance, router_entropy, router_z
from moestro.routing import Routing, RoutingContext

E, K = 8, 2
CONTEXT = RoutingContext(shape=(2, 8))


def even() -> tuple[Routing, torch.Tensor]:
    """Every expert serves as many slots as every other, in each of the two rows, at uniform probabilities."""
    first = torch.arange(16) % E
    indices = torch.stack([first, (first + 1) % E], dim=1)
    return Routing(torch.zeros(16, E), torch.full((16, K), 0.5), indices), torch.full((16, E), 1 / E)


def skewed(seed: int = 0) -> tuple[Routing, torch.Tensor]:
    logits = 2 * torch.randn(16, E, generator=torch.Generator().manual_seed(seed))
    probabilities = logits.softmax(-1)
    weights, indices = probabilities.topk(K)
    return Routing(logits, weights, indices), probabilities


@pytest.mark.parametrize("loss", [load_balance, expert_balance])
def test_balance_is_one_when_even_and_more_when_not(loss) -> None:
    assert_close(loss(*even(), CONTEXT), torch.tensor(1.0))
    logits = torch.zeros(16, E)
    logits[:, 0] = 9.0
    one = Routing(logits, torch.ones(16, 1), torch.zeros(16, 1, dtype=torch.long))
    assert float(loss(one, logits.softmax(-1), CONTEXT)) == pytest.approx(E, rel=0.02)
    assert float(loss(*skewed(), CONTEXT)) > 1


def test_device_balance_looks_at_groups_only() -> None:
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert_close(device_balance(*even(), CONTEXT, groups=groups), torch.tensor(1.0))
    indices = torch.tensor([[0, 4]]).expand(16, 2)  # uneven within groups, even between them
    uniform = torch.full((16, E), 1 / E)
    assert_close(
        device_balance(Routing(uniform.log(), uniform[:, :2], indices), uniform, CONTEXT, groups=groups),
        torch.tensor(1.0),
    )
    with pytest.raises(ValueError, match="do not partition the 8 experts"):
        device_balance(*even(), CONTEXT, groups=[[0, 1], [2, 3]])


def test_z_loss_and_entropy_are_their_formulas() -> None:
    routing, probabilities = skewed()
    assert_close(router_z(routing, probabilities, CONTEXT), routing.logits.exp().sum(1).log().square().mean())
    assert_close(router_entropy(*even(), CONTEXT), torch.tensor(E).log())
    certain = torch.eye(E)
    certain.requires_grad_()
    entropy = router_entropy(Routing(certain, certain, certain.long()), certain, RoutingContext((1, E)))
    entropy.backward()
    assert float(entropy) < 1e-30
    assert torch.isfinite(certain.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_padding_never_counts(name: str) -> None:
    options = {"groups": [[0, 1, 2, 3], [4, 5, 6, 7]]} if name == "device_balance" else {}
    routing, probabilities = skewed()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, :3] = False
    keep = mask.reshape(-1)
    masked = LOSSES[name](routing, probabilities, RoutingContext(shape=(2, 8), mask=mask), **options)
    cut = Routing(*(t[keep] for t in routing))
    assert_close(masked, LOSSES[name](cut, probabilities[keep], RoutingContext(shape=(2, 5)), **options))
    poisoned = Routing(routing.logits.clone(), routing.weights, routing.indices.clone())
    poisoned.logits[~keep] = 50.0
    poisoned.indices[~keep] = 7
    changed = torch.where(keep[:, None], probabilities, 1 / E)
    assert_close(LOSSES[name](poisoned, changed, RoutingContext(shape=(2, 8), mask=mask), **options), masked)


def test_unused_slots_never_count() -> None:
    routing, probabilities = skewed()
    wider = Routing(
        routing.logits,
        torch.cat([routing.weights, torch.zeros(16, 1)], 1),
        torch.cat([routing.indices, torch.full((16, 1), E)], 1),
    )
    for loss in (load_balance, expert_balance):
        if loss is load_balance:
            assert_close(loss(wider, probabilities, CONTEXT), loss(routing, probabilities, CONTEXT))


def test_gradients_push_towards_balance() -> None:
    logits = torch.zeros(16, E, requires_grad=True)
    busy = torch.zeros(16, 1, dtype=torch.long)
    load_balance(Routing(logits, torch.ones(16, 1), busy), logits.softmax(-1), CONTEXT).backward()
    assert (logits.grad[:, 0] > 0).all()  # descent lowers the busy expert
    assert (logits.grad[:, 1:] < 0).all()
