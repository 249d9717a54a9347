"""Recipes: plain data, checked before any work, done as a whole, carried by checkpoints and repeated on siblings."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import moestro
import tiny
from families.tiny import build
from moestro import SwitchOff
from moestro import recipe as recipes
from moestro.cli import app
from moestro.fitting.statistics import Origin, Statistics
from moestro.recipe import MadeOn, Notes, Recipe, keep, merge, set_top_k
from moestro.view.fingerprint import digest_of_files, digest_of_weights
from moestro.view.observe import LayerOutputs, LayerSlots, SlotStatistics, SlotStats
from tiny import documents, logits_of, make, padded

INPUTS = padded(documents(7, 3, 9), "left")
L1, L2 = "model.layers.1.mlp", "model.layers.2.mlp"
CUT = Recipe(
    (keep({L1: [1, 3, 4, 6, 7], L2: [0, 2, 3, 5, 6]}), merge({L1: [[0, 2], [1], [3]], L2: [[4, 1], [2], [0]]}))
)


@pytest.fixture
def qwen() -> moestro.ExpertView:
    return moestro.open(make("qwen3_moe").model)


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = (load_file(path / "model.safetensors") for path in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- data ------------------------------------------------------------------------------------------------------------


def test_json_brings_back_the_same(tmp_path: Path) -> None:
    operations = (
        keep({L1: [5, 0, 3]}),
        merge({L1: [[0, 2], [1]]}, {L1: torch.tensor([0.1, 1 / 3, 2.0])}),
        set_top_k(1),
    )
    whole = Recipe(operations, MadeOn("X", {L1: 8}, {L1: 2}), "statistics.json", "half of them")
    whole.save(tmp_path / "recipe.json")
    again = Recipe.load(tmp_path / "recipe.json")
    assert again == whole
    assert again.note == "half of them"
    assert Recipe.load(tmp_path) == whole
    assert again.counts({L1: 8, L2: 8}) == {L1: 2, L2: 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2, and this moestro reads schema 1"),
        ({"schema": None}, "schema None"),
        ({"operations": [{"kind": "distil"}]}, "operation 1 is 'distil'; this moestro knows keep, merge, set_top_k"),
        ({"operations": [{"kind": "keep"}]}, "'keep' has experts"),
        ({"operations": [{"kind": "keep", "experts": {L1: [0, 1.5]}}]}, "1.5"),
        ({"operations": [{"kind": "keep", "experts": {L1: [0, 0]}}]}, "named twice"),
        ({"operations": [{"kind": "set_top_k", "top_k": True}]}, "no whole number"),
        ({"operations": "keep"}, "a list"),
        ({"more": 1}, "'more'"),
        ({"made_on": {"architecture": "X"}}, "made_on"),
    ],
)
def test_what_is_no_recipe_of_this_version_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(Recipe((set_top_k(1),)).to_data() | change))
    with pytest.raises(ValueError, match=message):
        Recipe.load(tmp_path / "r.json")


@pytest.mark.parametrize("ids", [iter([0, 2, 3]), (e for e in (0, 2, 3)), np.array([0, 2, 3]), torch.tensor([0, 2, 3]),
                                 [np.int64(0), torch.tensor(2), 3], range(0, 4, 2), {3, 0, 2}])  # fmt: skip
def test_ids_become_plain_numbers_once(qwen: moestro.ExpertView, ids: Any) -> None:
    wanted = [0, 2] if isinstance(ids, range) else [0, 2, 3]
    qwen.keep_experts({1: ids, np.int64(2): [4, 5, 6]})
    assert qwen.original_ids == {1: wanted, 2: [4, 5, 6]}
    assert all(type(e) is int for e in qwen.original_ids[1])
    assert qwen.layer(1).num_experts == len(wanted)


@pytest.mark.parametrize("ids", [torch.tensor([0, 0, 3]), [np.int64(3), 3], [True, False, True], [0.0, 1.0, 2.0], "012",
                                 torch.tensor([True] * 8), torch.tensor([0.0, 1, 2]), {0: 1, 1: 1}, 3, [[0, 1], [2, 3]],
                                 [None, 1, 2]])  # fmt: skip
def test_ids_that_are_none_are_refused(qwen: moestro.ExpertView, ids: Any) -> None:
    state = tiny.state_of(qwen.model)
    for refused in (
        lambda: qwen.keep_experts({1: ids, 2: [0, 1, 2]}),
        lambda: qwen.merge_experts({2: [[0], ids, [7]]}),
    ):
        with pytest.raises(ValueError, match=r"layer [12]"):
            refused()
    assert tiny.same_state(qwen.model, state)


# --- names -----------------------------------------------------------------------------------------------------------


def test_layers_go_by_the_name_of_their_block(qwen: moestro.ExpertView) -> None:
    other = moestro.open(copy.deepcopy(qwen.model))
    qwen.keep_experts({L1: [0, 3, 5], "layers.2.mlp": [1, 2]})
    other.keep_experts({1: [0, 3, 5], "2": [1, 2]})
    assert qwen.original_ids == other.original_ids
    assert tiny.same_state(qwen.model, tiny.state_of(other.model))
    assert [op.layers() for op in qwen.state.recipe] == [["layers.1.mlp", "layers.2.mlp"]]  # as the stack knows them
    for wrong, message in (({"model.layers.9.mlp": [0, 1]}, "names 0 of the layers"), ({1: [0], L1: [1]}, "twice")):
        with pytest.raises(ValueError, match=message):
            qwen.keep_experts(wrong)


# --- check and apply -------------------------------------------------------------------------------------------------


def test_a_check_changes_nothing_and_says_what_saving_would(qwen: moestro.ExpertView, tmp_path: Path) -> None:
    before, config = logits_of(qwen.model, INPUTS), qwen.model.config.to_dict()
    state = tiny.state_of(qwen.model)
    qwen.check(CUT)
    with pytest.raises(ValueError, match="format='gguf' is not known; there are hf"):
        qwen.check(CUT, "gguf")
    uneven = Recipe((keep({L1: [0, 1]}),))
    qwen.check(uneven, None)
    with pytest.raises(ValueError, match="store one number of experts for all layers"):
        qwen.check(uneven)
    assert tiny.same_state(qwen.model, state)
    assert qwen.model.config.to_dict() == config
    assert qwen.state.recipe == []
    assert torch.equal(logits_of(qwen.model, INPUTS), before)


REFUSED: list[tuple[str, Recipe, str]] = [
    ("deepseek_v3", Recipe((keep({1: [0, 1, 2, 4], 2: [0, 1, 2, 4]}),)), r"asked for \[3, 1\]"),
    ("deepseek_v4", Recipe((keep({0: [0, 1, 2]}),)), "token id"),
    ("deepseek_v4", Recipe((keep({1: [0, 1, 2], 2: [0, 1, 2]}),)), "one number of experts|no plain"),
    ("ernie4_5_vl_moe", Recipe((keep({i: [0, 1, 2, 3] for i in (1, 2, 3)}),)), "no plain|one number"),
    ("phimoe", Recipe((set_top_k(3),)), "top_k cannot be changed"),
    ("qwen3_moe", Recipe((set_top_k(3), keep({1: [0, 1], 2: [0, 1]}))), "keep=2 experts cannot serve top_k=3"),
    ("qwen3_moe", Recipe((keep({1: [0, 1], 2: [0, 1]}), keep({1: [0, 5], 2: [0, 1]}))), "there is no expert 5"),
]


@pytest.mark.parametrize(("family", "recipe", "message"), REFUSED)
def test_what_cannot_be_is_refused_before_any_work(family: str, recipe: Recipe, message: str) -> None:
    small = make(family) if family in tiny.OVERRIDES else tiny.build(family)
    view = moestro.open(small.model)
    state, config = tiny.state_of(small.model), small.model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        view.check(recipe)
    assert tiny.same_state(small.model, state)
    assert small.model.config.to_dict() == config


def test_a_generation_config_that_cannot_be_saved_is_refused_and_the_way_out_leads_out(
    qwen: moestro.ExpertView, tmp_path: Path
) -> None:
    import transformers

    qwen.model.generation_config.temperature = 0.3
    qwen.model.generation_config.do_sample = False
    with pytest.raises(ValueError, match=r"temperature.*generation_config = transformers\.GenerationConfig\(\)"):
        qwen.check(CUT)
    qwen.check(CUT, None)
    qwen.model.generation_config = transformers.GenerationConfig()
    qwen.check(CUT)
    qwen.save(tmp_path / "out")


def test_a_tokenizer_larger_than_the_embedding_is_refused(qwen: moestro.ExpertView) -> None:
    qwen.tokenizer = moestro.open("quartet").tokenizer
    with pytest.raises(ValueError, match=r"the model embeds ids 0\.\.130"):
        qwen.check(CUT)
    qwen.model.resize_token_embeddings(len(qwen.tokenizer))
    qwen.check(CUT)


def test_all_of_a_recipe_is_done_or_nothing(qwen: moestro.ExpertView) -> None:
    state, before = tiny.state_of(qwen.model), logits_of(qwen.model, INPUTS)
    with pytest.raises(ValueError, match=r"operation 3|there is no expert 7"):
        qwen.apply(Recipe((*CUT.operations, keep({1: [0, 7], 2: [0, 1]}))))
    assert tiny.same_state(qwen.model, state)
    assert torch.equal(logits_of(qwen.model, INPUTS), before)
    step = moestro.open(copy.deepcopy(qwen.model))
    qwen.apply(CUT)
    for operation in CUT.operations:
        step.apply(Recipe((operation,)))
    assert tiny.same_state(qwen.model, tiny.state_of(step.model))
    assert qwen.original_ids == step.original_ids == {1: [1, 3, 6], 2: [2, 3, 0]}


def test_bytes_after_are_those_of_the_file(qwen: moestro.ExpertView) -> None:
    expected = qwen.bytes_after(CUT)
    qwen.apply(CUT)
    assert qwen.num_bytes == expected


def test_views_of_one_model_share_its_history(qwen: moestro.ExpertView, tmp_path: Path) -> None:
    other = moestro.open(qwen.model.model)  # opened on a part, with shorter names
    qwen.apply(CUT)
    assert other.original_ids == qwen.original_ids
    assert [layer.num_experts for layer in other.layers] == [3, 3]
    other.keep_experts({1: [2, 0], 2: [0, 1]})
    assert qwen.original_ids == {1: [6, 1], 2: [2, 3]}
    assert qwen.model.config.num_experts == 2
    qwen.save(tmp_path / "ck")
    again = moestro.open(make("qwen3_moe").model)
    again.apply(Recipe.load(tmp_path / "ck"))
    assert tiny.same_state(again.model, tiny.state_of(qwen.model))


def test_a_recipe_for_another_model_is_refused_with_the_difference(qwen: moestro.ExpertView) -> None:
    here = MadeOn("Qwen3MoeForCausalLM", {L1: 8, L2: 8}, {L1: 2, L2: 2})
    for made_on, message in (
        (MadeOn("MixtralForCausalLM", here.experts, here.top_k), "made on MixtralForCausalLM, and this is Qwen3Moe"),
        (MadeOn(here.architecture, {L1: 8, L2: 16}, here.top_k), f"experts 16 in {L2}; here it is 8"),
        (MadeOn(here.architecture, here.experts, {L1: 4, L2: 4}), "top_k 4"),
        (
            MadeOn(here.architecture, {"model.layers.7.mlp": 8}, {"model.layers.7.mlp": 2}),
            "with experts in model.layers.7",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            qwen.check(Recipe(CUT.operations, made_on))
    qwen.apply(Recipe(CUT.operations, here))


# --- what checkpoints carry ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_cut_after_a_reload_keeps_the_lineage(qwen: moestro.ExpertView, stream: bool, tmp_path: Path) -> None:
    whole = copy.deepcopy(qwen.model)
    qwen.apply(CUT)
    qwen.save(tmp_path / "once")
    again = moestro.open(tmp_path / "once", stream=stream)
    assert again.original_ids == {1: [1, 3, 6], 2: [2, 3, 0]}
    again.keep_experts({1: [2, 0], 2: [0, 2]})
    again.save(tmp_path / "twice")
    third = moestro.open(tmp_path / "twice", stream=stream)
    assert third.original_ids == {1: [6, 1], 2: [2, 0]}
    assert [len(recipe.operations) for recipe in third.state.lineage] == [2, 1]
    third.save(tmp_path / "thrice")  # nothing was done in between
    assert moestro.open(tmp_path / "thrice").original_ids == third.original_ids
    everything = Recipe.load(tmp_path / "thrice")
    assert len(everything.operations) == 3
    other = moestro.open(whole)
    other.apply(everything)
    other.save(tmp_path / "at once")
    assert same_weights(tmp_path / "at once", tmp_path / "twice")


def test_notes_of_an_older_moestro_and_of_another_model(qwen: moestro.ExpertView, tmp_path: Path) -> None:
    qwen.keep_experts({1: [0, 2], 2: [5, 7]})
    qwen.save(tmp_path / "ck")
    note = tmp_path / "ck" / "moestro.json"
    note.write_text(json.dumps({"original_experts": {"1": [0, 2], "2": [5, 7]}}))
    view = moestro.open(tmp_path / "ck")
    view.keep_experts({2: [1, 0]})
    assert view.original_ids == {1: [0, 2], 2: [7, 5]}
    with pytest.raises(ValueError, match="saved by an older moestro"):
        Recipe.load(tmp_path / "ck")
    note.write_text(json.dumps({"original_experts": {"1": [0, 2, 3], "2": [5, 7]}}))
    with pytest.raises(ValueError, match="belongs to another checkpoint"):
        moestro.open(tmp_path / "ck")
    note.write_text("{")
    with pytest.raises(ValueError, match=r"moestro\.json.*delete it"):
        moestro.open(tmp_path / "ck")


# --- streams ---------------------------------------------------------------------------------------------------------


def test_an_observation_goes_on_for_the_very_recipe_and_observer_alone(
    qwen: moestro.ExpertView, tmp_path: Path
) -> None:
    qwen.save(tmp_path / "ck")
    ids = INPUTS["input_ids"]

    def observed(observer: Any, work: str | None, *operations: Any) -> Any:
        view = moestro.open(tmp_path / "ck", stream=True)
        view.apply(Recipe(operations))
        return view.observe([ids], [observer], progress=False, work=None if work is None else tmp_path / work)[0]

    kept, merged = keep({1: [0, 1, 4], 2: [0, 1, 4]}), merge({1: [[0, 3], [1, 2], [4, 7]], 2: [[0, 3], [1, 2], [4, 7]]})
    expected = observed(SlotStats(), "kept", kept)
    assert torch.equal(observed(SlotStats(), "kept", kept).layers[1].norm_sum, expected.layers[1].norm_sum)
    weighted = merge(merged.clusters, {i: torch.arange(1.0, 9) for i in (1, 2)})
    observed(SlotStats(), "merged", merged)
    for other in ((merged, "kept"), (weighted, "merged"), (None, "merged")):
        with pytest.raises(ValueError, match="with other recipe;"):
            observed(SlotStats(), other[1], *filter(None, other[:1]))
    observed(LayerOutputs(max_tokens=2), "outputs")
    with pytest.raises(ValueError, match="with other observers;"):
        observed(LayerOutputs([2], max_tokens=2), "outputs")
    assert len(observed(LayerOutputs(max_tokens=2), "outputs")[1][0]) == 2


class Above:
    """An observer without a key: its parameter is part of its state."""

    needs: frozenset[str] = frozenset()

    def __init__(self, limit: float, names: set[str]):
        self.limit, self.names, self.seen = limit, names, 0

    def update(self, event: Any) -> None:
        self.seen += int((event.routing.weights > self.limit).sum())

    def merge(self, other: Any) -> None:
        self.seen += other.seen

    def result(self) -> int:
        return self.seen


def test_an_observer_without_a_key_is_known_by_its_state(qwen: moestro.ExpertView, tmp_path: Path) -> None:
    qwen.save(tmp_path / "ck")
    view = moestro.open(tmp_path / "ck", stream=True)
    args: dict[str, Any] = dict(progress=False, work=tmp_path / "work")
    names = {f"name{i}" for i in range(20)}
    first = view.observe([INPUTS], [Above(0.5, names)], **args)
    assert view.observe([INPUTS], [Above(0.5, set(sorted(names, reverse=True)))], **args) == first
    for other in (Above(0.4, names), Above(0.5, names - {"name3"})):
        with pytest.raises(ValueError, match="with other observers;"):
            view.observe([INPUTS], [other], **args)


# --- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured(recipes.SetTopK):
    kind: ClassVar[str] = "measured"
    portable: ClassVar[recipes.Portable] = "needs data"

    @classmethod
    def from_data(cls, data: Any) -> Any:
        return cls(data["top_k"])


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_the_command_repeats_a_recipe_on_a_sibling(
    qwen: moestro.ExpertView, stream: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sibling = moestro.open(copy.deepcopy(qwen.model))
    for parameter in sibling.model.parameters():
        parameter.data.mul_(1.01)
    sibling.save(tmp_path / "base")
    qwen.apply(CUT)
    qwen.save(tmp_path / "instruct-cut")
    sibling.apply(CUT)
    sibling.save(tmp_path / "expected")
    command = ["apply", str(tmp_path / "instruct-cut")]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "base"), "--out", str(tmp_path / "out"), *stream])
    assert result.exit_code == 0, result.exception
    assert same_weights(tmp_path / "out", tmp_path / "expected")
    assert Notes.read(tmp_path / "out").recipe.operations == CUT.operations
    for other, message in (
        ("quartet", "experts 8 in model.layers.1.mlp; here it is 32"),
        (str(tmp_path / "out"), "experts 8"),
    ):
        result = CliRunner().invoke(app, [*command, other, "--out", str(tmp_path / "no")])
        assert message in str(result.exception)
    monkeypatch.setitem(recipes.OPERATIONS, "measured", Measured)
    Recipe((Measured(1),)).save(tmp_path / "measured.json")
    result = CliRunner().invoke(
        app, ["apply", str(tmp_path / "measured.json"), str(tmp_path / "base"), "--out", f"{tmp_path}/no"]
    )
    assert "cannot be repeated on another model" in str(result.exception)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "instruct-cut", "expected", "out", "measured.json"}


# --- what was found by trying to break it -----------------------------------------------------------------------------


def test_merge_weights_are_finite_and_of_layers_that_are_there(qwen: moestro.ExpertView) -> None:
    clusters, ones = {1: [[0, 1], [2], [3]]}, [1.0] * 8
    for weights, message in (
        ({1: [*ones[:7], float("nan")]}, "merge weights of layer 1: nan is no weight"),
        ({1: ones, 77: ones}, "decoder layer 77 has no experts"),
        ({L1: ones}, "merge names layer model.layers.1.mlp twice"),
    ):
        with pytest.raises(ValueError, match=message):
            qwen.merge_experts(clusters, weights)
    assert qwen.layers[0].num_experts == 8


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_what_was_done_under_a_wrapper_fits_the_model_without_it(qwen: moestro.ExpertView, wrap: Any) -> None:
    wrapped = moestro.open(wrap(copy.deepcopy(qwen.model)))
    wrapped.keep_experts({1: [0, 3, 4], 2: [7, 6]})
    qwen.apply(Recipe.from_data(wrapped.notes()["recipe"]))
    inner = next(module for module in wrapped.model.children())
    assert torch.equal(logits_of(inner, INPUTS), logits_of(qwen.model, INPUTS))


def test_two_stacks_in_one_block_run_after_either_is_cut() -> None:
    model, inputs = build("ernie4_5_vl_moe", num_hidden_layers=2).model, {"input_ids": torch.arange(40, 49)[None]}
    text = moestro.open(model, part="text_moe")
    text.keep_experts({layer.index: [0, 4, 5] for layer in text.layers})
    assert torch.isfinite(logits_of(model, inputs)).all()
    vision = moestro.open(model, part="vision_moe")
    vision.keep_experts({layer.index: [1, 2, 7] for layer in vision.layers})
    kinds = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 1, 0]])
    assert torch.isfinite(
        logits_of(model, {**inputs, "mm_token_type_ids": kinds, "moe_mm_token_type_ids": kinds})
    ).all()


def test_statistics_know_a_model_by_every_weight(qwen: moestro.ExpertView, tmp_path: Path) -> None:
    weights, files = digest_of_weights(qwen.model), []
    for number in range(2):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "model.safetensors").write_bytes(bytes(99_999) + bytes([number]) + bytes(99_999))
        files.append(digest_of_files([tmp_path / f"{number}" / "model.safetensors"]))
    assert digest_of_weights(make("qwen3_moe").model) == weights
    with torch.no_grad():
        qwen.layers[0].experts.down_proj[5, 33, 7] += 1e-3
    assert digest_of_weights(qwen.model) != weights
    assert files[0] != files[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"schema": 1, "operations": [{"kind": "keep", "experts": {"1": [0, 1], "1": [2, 3]}}]}',
            "'1' is given twice",
        ),
        ('{"schema": 1, "operations": [{"kind": ["keep"], "experts": {"1": [0, 1]}}]}', "this moestro knows keep"),
        ('{"schema": 1, "operations": [], "note": [1]}', "note of a recipe is a text"),
    ],
)
def test_what_a_hand_has_spoilt_is_refused_with_the_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.load(tmp_path / "recipe.json")


def test_one_id_alone_in_a_tensor_is_one_expert() -> None:
    assert keep({1: torch.tensor(3)}).experts == {"1": [3]}


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    sums = LayerSlots(*(torch.ones(1, 8, dtype=torch.float64) for _ in range(4)))
    whole = Statistics(Origin("A", [], "data", "weights", None), {"slots": SlotStatistics(("a",), {1: sums}, {"a": 9})})
    whole.save(tmp_path)
    found = Statistics.load(tmp_path)
    assert found is not None
    assert found.damage({1: 8}) is None
    assert "layers [1]" in (found.damage({1: 8, 2: 8}) or "")
    assert "1 x 7 finite numbers" in (found.damage({1: 7}) or "")
    file = tmp_path / "statistics.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be read"):
        Statistics.load(tmp_path)


def test_a_fit_waits_until_edits_are_over(qwen: moestro.ExpertView, tmp_path: Path) -> None:
    with qwen.edits(SwitchOff({(1, 0)})), pytest.raises(RuntimeError, match="end the edits and observations first"):
        moestro.fit(qwen, stats=tmp_path / "stats")
    assert not (tmp_path / "stats").exists()
