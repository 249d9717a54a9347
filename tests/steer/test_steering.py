"""Steering files: what they hold, and the models they refuse."""

import json

import pytest
import torch

import moestro
import tiny
from moestro import ForceOn, Gain, LogitBias, Reselect, SwitchOff
from moestro.steer.attention_patterns import KeepRecent
from moestro.steer.reroute import rank
from moestro.steer.self_contrast import self_contrast
from moestro.steer.steering import SelfContrast, Steering
from moestro.view.heads import HeadGain, HeadMask

IDS = torch.randint(0, 131, (2, 7), generator=torch.Generator().manual_seed(3))
EDITS = (
    SwitchOff({(1, 3), (2, 0)}),
    ForceOn({(2, 1)}),
    Gain({(1, 2): 0.5, (2, 2): 3.0}, renormalize=True),
    LogitBias({2: torch.linspace(-1, 1, 8)}),
    HeadGain({(0, 1): 0.0, (2, 3): 1.5}),
    HeadMask({(0, 2)}, "uniform"),
    HeadMask({(1, 4), (1, 5)}, "mean", {1: torch.linspace(-1, 1, 96).view(6, 16)}),
    KeepRecent({(2, 0), (0, 5)}, 3, first=0),
)


@pytest.fixture
def view():
    return moestro.open(tiny.make("qwen3_moe").model)


def logits(view) -> torch.Tensor:
    with torch.no_grad():
        return view.model(IDS).logits


def test_a_saved_setup_steers_as_the_edits_do(view, tmp_path) -> None:
    with view.edits(*EDITS):
        steered = logits(view)
    plain = logits(view)
    path = Steering.of(view, *EDITS, learned_from="a test", note="n").save(tmp_path / "s.json")
    setup = Steering.load(path)
    assert setup == Steering.of(view, *EDITS, learned_from="a test", note="n")
    with setup.on(view):
        assert torch.equal(logits(view), steered)
    assert torch.equal(logits(view), plain)
    assert not torch.equal(plain, steered)
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_the_type_that_a_checkpoint_is_loaded_in_does_not_matter(view) -> None:
    setup = Steering.of(view, *EDITS)
    setup.check(moestro.open(view.model.to(torch.bfloat16)))


def test_other_models_are_refused(view) -> None:
    setup = Steering.of(view, *EDITS)
    other = tiny.make("qwen3_moe").model
    with torch.no_grad():
        moestro.open(other).layers[0].router.weight.add_(0.1)
    with pytest.raises(ValueError, match="router weights differ"):
        setup.check(moestro.open(other))
    with pytest.raises(ValueError, match="for a Qwen3MoeForCausalLM, and this is a GptOss"):
        setup.check(moestro.open(tiny.make("gpt_oss").model))
    fewer = moestro.open(tiny.make("qwen3_moe", num_attention_heads=3).model)
    with pytest.raises(ValueError, match=r"for heads \{0: 6, 1: 6, 2: 6\} by layer, and this model has \{0: 3"):
        setup.check(fewer)
    assert not Steering.of(view, SwitchOff({(1, 3)})).model.heads
    view.keep_experts({layer.index: [0, 2, 3, 5] for layer in view.layers})
    with pytest.raises(ValueError, match="has 4: experts were pruned"), setup.on(view):
        pass


def test_edits_that_no_file_can_hold_are_refused(view) -> None:
    with pytest.raises(TypeError, match="Reselect cannot be written"):
        Steering.of(view, Reselect(lambda layer, logits: logits))
    with pytest.raises(ValueError, match="rows of a batch"):
        Steering.of(view, SwitchOff({(1, 3)}, rows=[0]))


def test_broken_files_are_refused_by_name(view, tmp_path) -> None:
    path = tmp_path / "s.json"
    with pytest.raises(FileNotFoundError, match="no steering file at"):
        Steering.load(path)
    path.write_text('{"edits": []}')
    with pytest.raises(ValueError, match=r"s\.json is no steering file: model"):
        Steering.load(path)
    setup = Steering.of(view)
    setup.edits.append({"kind": "hypnosis"})
    with pytest.raises(ValueError, match="'hypnosis'; known kinds"):
        setup.build()


def test_a_way_of_decoding_is_saved_with_the_edits(view, tmp_path) -> None:
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(IDS)
    with view.edits(*EDITS), self_contrast(view, rank(view, 3), beta=4.0) as processor:
        contrasted = view.model.generate(IDS, attention_mask=mask, logits_processor=[processor], **options)
    setup = Steering.of(view, *EDITS, decoding=SelfContrast(rank=3, beta=4.0))
    setup = Steering.load(setup.save(tmp_path / "s.json"))
    with setup.on(view) as processors:
        found = view.model.generate(IDS, attention_mask=mask, logits_processor=processors, **options)
    assert torch.equal(found, contrasted)
    assert tiny.hooks_on(view.model) == 0
    with Steering.of(view, *EDITS).on(view) as processors:
        assert not processors
        plain = view.model.generate(IDS, attention_mask=mask, logits_processor=processors, **options)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize(
    ("field", "value"), [("beta", -1), ("alpha", 0), ("rank", 0), ("gamma", 1), ("kind", "hypnosis")]
)
def test_broken_ways_of_decoding_are_refused_by_name(view, tmp_path, field: str, value: object) -> None:
    path = Steering.of(view, decoding=SelfContrast()).save(tmp_path / "s.json")
    content = json.loads(path.read_text())
    content["decoding"][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"s\.json is no steering file: decoding\.{field}"):
        Steering.load(path)


def test_a_rank_that_the_model_does_not_have_is_refused(view) -> None:
    setup = Steering.of(view, decoding=SelfContrast(rank=9))
    with pytest.raises(ValueError, match="k=9 in layer 1"), setup.on(view):
        pass
