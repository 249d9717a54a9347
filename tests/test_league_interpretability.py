"""What the league measures on neurons and experts, and the removal of a domain's experts."""

from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.data.rules import chains
from moestro.evidence.league import interpretability, run, tasks
from moestro.evidence.league.entries import SIZE
from moestro.evidence.removal import Removal, removal, rises

DOMAINS = 4
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
SETTINGS = run.Settings(size={**SIZE, **SMALL})


@pytest.fixture
def task() -> tasks.Task:
    return tasks._generated(partial(chains, length=16, domains=DOMAINS, alphabet=8), rows=32, heldout=32).first(8)


def built(entry: str, task: tasks.Task) -> Any:
    return run.build(entry, SETTINGS, task).eval()


def inputs_of(module: torch.nn.Module, model: Any, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with module.register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return seen[0].flatten(0, -2)


def neurons(model: Any, ids: Tensor) -> list[Tensor]:
    sites = {interpretability._neuron_site(layer.mlp): interpretability._read for layer in model.model.layers}
    return interpretability._before_each(model, ids, sites)


def test_a_dense_layers_neurons_are_what_its_last_matrix_reads(task: tasks.Task) -> None:
    model = built("dense", task)
    found = neurons(model, task.heldout.ids)  # several batches
    assert torch.equal(found[1][: 8 * 16], inputs_of(model.model.layers[1].mlp.down_proj, model, task.heldout.ids[:8]))
    assert found[1].shape == (32 * 16, 32)


def test_a_mixtures_neurons_make_its_output(task: tasks.Task) -> None:
    model = built("moe-x", task)
    ids = task.heldout.ids[:8]
    found = neurons(model, ids)[0]
    experts = model.model.layers[0].mlp.experts
    outputs: list[Tensor] = []
    with experts.register_forward_hook(lambda _m, _a, out: outputs.append(out)), torch.no_grad():
        model(input_ids=ids, use_cache=False)
    down = experts.down_proj.transpose(1, 2).flatten(0, 1)  # [E * I, H]
    torch.testing.assert_close(found @ down, outputs[0], atol=1e-5, rtol=1e-4)
    assert ((found != 0).view(len(found), 16, -1).any(dim=-1).sum(dim=1) <= 2).all()


def test_a_neuron_of_monet_counts_with_its_parts_gate(task: tasks.Task) -> None:
    model = built("monet", task)
    ids = task.heldout.ids[:8]
    found, experts = neurons(model, ids)[0], model.model.layers[0].mlp.experts
    half = found.shape[1] // 2
    # each side's own neurons times their gates are the first half, and the second, of what a side's matrix reads
    torch.testing.assert_close(found[:, :half], inputs_of(experts.down_left, model, ids)[:, :half])
    torch.testing.assert_close(found[:, half:], inputs_of(experts.down_right, model, ids)[:, half:])


def test_experts_of_rows_that_are_routed_by_domain_take_nothing_from_others(task: tasks.Task) -> None:
    model = built("row", task)
    data = {
        name: [task.data.ids[task.data.domain == number].split(4)[0]] for number, name in enumerate(task.data.domains)
    }
    of = removal(model, data)
    assert of.owned == pytest.approx(2 / 16)
    ids, domain = task.heldout.ids, task.heldout.domain
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        for number, name in enumerate(task.data.domains):
            with of.without[name]():
                changed = (model(input_ids=ids, use_cache=False).logits != whole).flatten(1).any(dim=1)
            assert changed.tolist() == (domain == number).tolist()
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, whole)


@pytest.mark.parametrize("entry", ["dense", "top_k", "monet"])
def test_removal_works_on_every_kind_and_is_undone(entry: str, task: tasks.Task) -> None:
    model = built(entry, task)
    data = {name: [task.data.ids[task.data.domain == number][:4]] for number, name in enumerate(task.data.domains)}
    of = removal(model, data)
    assert list(of.without) == list(data)
    assert 0 <= of.owned <= 1
    with torch.no_grad():
        whole = model(input_ids=task.heldout.ids, use_cache=False).logits
        for without in of.without.values():
            with pytest.raises(KeyError), without():
                raise KeyError
        assert torch.equal(model(input_ids=task.heldout.ids, use_cache=False).logits, whole)


def test_rises_are_of_the_domain_and_of_the_others() -> None:
    losses = {"a": 1.0, "b": 2.0, "c": 3.0}

    @contextmanager
    def worse(**more: float) -> Any:
        before = dict(losses)
        losses.update({d: losses[d] + rise for d, rise in more.items()})
        yield
        losses.update(before)

    of = Removal({"a": partial(worse, a=0.5, b=0.1), "b": partial(worse, b=2.0, a=-0.2, c=0.4)}, owned=0.1)
    found = rises(of, lambda: dict(losses))
    assert found["a"] == (pytest.approx(0.5), pytest.approx(0.05))
    assert found["b"] == (pytest.approx(2.0), pytest.approx(0.1))


def test_a_neuron_that_knows_the_domain_is_found(task: tasks.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("dense", task)

    def told(only: int) -> Any:
        def activations(*_: Any) -> list[Tensor]:
            generator = torch.Generator().manual_seed(0)
            acts = torch.rand(*task.heldout.ids.shape, 8, generator=generator)
            acts[..., :only] = torch.nn.functional.one_hot(task.heldout.domain, DOMAINS)[:, None, :only].float()
            return [acts.flatten(0, 1)] * 2

        return activations

    monkeypatch.setattr(interpretability, "_before_each", told(DOMAINS))
    all_known = interpretability._neurons(model, task)
    assert all_known["coverage"] == all_known["reconstruction"] == 1.0
    assert all_known["active neurons"] == pytest.approx(5, abs=0.1)  # one of the four, and four that are noise
    monkeypatch.setattr(interpretability, "_before_each", told(2))
    half_known = interpretability._neurons(model, task)
    assert 0.6 < half_known["coverage"] < 0.8  # 1, 1, and twice the 0.4 of a neuron that always says yes
    assert half_known["reconstruction"] == pytest.approx(0.5, abs=0.05)
