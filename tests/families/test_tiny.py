"""Every family of the installed transformers with an experts class can be built small, and runs."""

from pathlib import Path

import pytest
import torch
import transformers

from . import tiny

# Experts classes that no text input reaches.
NOT_REACHED = {"Qwen3OmniMoeTalkerTextExperts": "the speech model of Qwen3-Omni is driven by embeddings, not by text"}


def experts_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "is_concatenated")]


def test_families_are_those_of_the_installed_transformers() -> None:
    sources = (Path(transformers.__file__).parent / "models").glob("*/*.py")
    found = {file.parent.name for file in sources if "use_experts_implementation" in file.read_text()}
    assert set(tiny.families()) == found
    assert len(found) >= 60


def test_every_experts_class_is_built_by_some_family() -> None:
    expected = {name for family in tiny.families() for name in tiny.experts_classes(family)}
    built = {type(e).__name__ for family in tiny.families() for e in experts_of(tiny.build(family).model)}
    assert expected - built == set(NOT_REACHED)


@pytest.mark.parametrize("family", tiny.families())
def test_builds_runs_and_agrees_between_experts_implementations(family: str) -> None:
    small = tiny.build(family)
    assert len(experts_of(small.model)) >= 2
    with torch.no_grad():
        small.model.set_experts_implementation("eager")
        eager = small.model(**small.inputs()).logits
        small.model.set_experts_implementation("batched_mm")
        batched = small.model(**small.inputs()).logits
    assert eager.isfinite().all()
    assert eager.std() > 0.01
    torch.testing.assert_close(batched, eager, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v4", "glm4v_moe"])
def test_same_seed_same_model_other_seed_other_model(family: str) -> None:
    first, again, other = (tiny.build(family, seed=seed) for seed in (0, 0, 1))
    with torch.no_grad():
        logits = [small.model(**small.inputs()).logits for small in (first, again, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)


@pytest.mark.parametrize("family", tiny.families())
def test_routing_is_decisive_and_uses_many_experts(family: str) -> None:
    """Seams are tested on these models, so a token's experts must not change with a rounding error."""
    small = tiny.build(family)
    chosen: list[set[int]] = []

    def record(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        indices, weights = args[1], args[2]
        chosen.append(set(indices.flatten().tolist()))
        assert weights.std() > 1e-3

    for experts in experts_of(small.model):
        experts.register_forward_pre_hook(record)
    with torch.no_grad():
        small.model(**small.inputs(B=4, T=24))
    assert chosen
    assert all(len(used) >= 2 for used in chosen), chosen
