"""What others read of a saved checkpoint: the config in its source's words, the files beside it, what is left out."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import Tensor

import moestro
import quantised
from families import tiny as families
from quantised import WEIGHTS, edit, qwen3_moe
from tiny import logits_of, make

EITHER = pytest.mark.parametrize("streamed", [False, True], ids=["memory", "streamed"])

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 32, "beta_slow": 1}
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
# {family: what the hub's config.json states and transformers 5 would rename or drop}
HUB: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"rope_theta": 1e6, "rope_scaling": None, "num_experts": 8, "use_sliding_window": False},
    "deepseek_v3": {
        "rope_theta": 10000, "rope_scaling": YARN, "n_routed_experts": 8, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    },
    "glm4_moe": {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "rope_scaling": None, "n_routed_experts": 8},
    "gpt_oss": {
        "rope_theta": 150000, "rope_scaling": YARN | {"rope_type": "yarn", "truncate": False}, "num_local_experts": 8,
        "experts_per_token": 2, "initial_context_length": 24,
    },
    "mixtral": {"rope_theta": 1e6, "num_local_experts": 8},
    "olmoe": {"rope_theta": 10000.0, "rope_scaling": None, "num_experts": 8, "clip_qkv": None},
    "minimax": {"rope_theta": 1e7, "num_local_experts": 8, "attn_type_list": [0, 1, 0, 1], "layernorm_mlp_beta": 3.5},
    "minimax_m2": {"rope_theta": 5e6, "rotary_dim": 8, "num_local_experts": 8, "scoring_func": "sigmoid"},
    "qwen3_vl_moe": {
        "rope_theta": 5e6, "rope_scaling": {"mrope_section": [3, 3, 2], "rope_type": "default"}, "num_experts": 8,
    },
}  # fmt: skip


def in_hub_words(family: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A tiny checkpoint whose config.json states the family's fields as the hub does, and nothing in the new words."""
    families.build(family).model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    place = config.get("text_config", config)
    for new in ("rope_parameters", *COUNTS):
        place.pop(new, None)
    place |= HUB[family]
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    return folder, HUB[family]


@pytest.mark.parametrize("family", HUB)
@EITHER
def test_what_the_source_stated_stays_stated_with_the_new_numbers(family: str, streamed: bool, tmp_path: Path) -> None:
    source, stated = in_hub_words(family, tmp_path / "source")
    view = moestro.open(source, stream=streamed)
    view.keep_experts({layer.index: [0, 1, 4, 5] for layer in view.layers})
    view.save(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    place = saved.get("text_config", saved)
    expected = {key: 4 if key in COUNTS else value for key, value in stated.items() if key != "auto_map"}
    assert {key: place.get(key, "nothing") for key in expected} == expected
    assert "auto_map" not in saved
    assert saved["torch_dtype"] == saved["dtype"] == "float32"
    if not streamed:
        again = type(view.model).from_pretrained(tmp_path / "out").eval()
        inputs = {"input_ids": torch.arange(30, 44)[None]}
        assert torch.equal(logits_of(again, inputs), logits_of(view.model, inputs))


def test_another_top_k_is_stated_under_every_name(tmp_path: Path) -> None:
    source, _ = in_hub_words("gpt_oss", tmp_path / "source")
    view = moestro.open(source)
    view.set_top_k(1)
    saved = json.loads((view.save(tmp_path / "out") / "config.json").read_text())
    assert (saved["experts_per_token"], saved["num_experts_per_tok"]) == (1, 1)


def test_rope_that_was_changed_in_memory_is_stated_in_the_old_words(tmp_path: Path) -> None:
    source, _ = in_hub_words("qwen3_moe", tmp_path / "source")
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(source)
    model.config.rope_parameters = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    saved = json.loads((moestro.open(model).save(tmp_path / "out") / "config.json").read_text())
    assert saved["rope_theta"] == 5e5
    assert saved["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert saved["rope_parameters"] == model.config.rope_parameters


def test_a_model_from_memory_keeps_the_words_of_its_directory(tmp_path: Path) -> None:
    source, stated = in_hub_words("deepseek_v3", tmp_path / "source")
    view = moestro.open(transformers.DeepseekV3ForCausalLM.from_pretrained(source))
    saved = json.loads((view.save(tmp_path / "out") / "config.json").read_text())
    assert {key: saved[key] for key in stated if key != "auto_map"} == {
        k: v for k, v in stated.items() if k != "auto_map"
    }


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen3_moe", {"num_experts": 8, "rope_theta": 10000.0, "rope_scaling": None}),
        ("olmoe", {"num_experts": 8, "rope_theta": 10000.0}),
        ("glm4_moe", {"n_routed_experts": 8, "partial_rotary_factor": 0.5}),
        ("deepseek_v3", {"n_routed_experts": 8, "rope_theta": 10000.0}),
    ],
)
def test_a_model_made_here_is_stated_as_the_hub_would(family: str, names: dict[str, Any], tmp_path: Path) -> None:
    saved = json.loads((moestro.open(families.build(family).model).save(tmp_path / "out") / "config.json").read_text())
    assert {key: saved.get(key, "nothing") for key in names} == names
    assert saved["torch_dtype"] == "float32"


def test_both_stacks_of_ernie_vl_keep_their_words(tmp_path: Path) -> None:
    families.build("ernie4_5_vl_moe").model.save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["text_config"] |= {"rope_theta": 5e5, "rope_scaling": {"type": "default", "mrope_section": [3, 3, 2]}}
    del config["text_config"]["rope_parameters"]
    config |= {"moe_num_experts": [8, 8], "torch_dtype": "float32"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    model = transformers.Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(tmp_path / "source")
    for part in ("text_moe", "vision_moe"):
        view = moestro.open(model, part=part)
        view.keep_experts({layer.index: [0, 3, 5, 6] for layer in view.layers})
    saved = json.loads((view.save(tmp_path / "out") / "config.json").read_text())
    assert saved["text_config"]["rope_theta"] == 5e5
    assert saved["text_config"]["rope_scaling"] == {"type": "default", "mrope_section": [3, 3, 2]}
    assert (saved["text_config"]["moe_num_experts"], saved["moe_num_experts"]) == (4, [4, 4])


# --- what lies beside the weights ------------------------------------------------------------------------------------

BESIDE = {
    "LICENSE": "do what you like",
    "NOTICE": "made by somebody",
    "preprocessor_config.json": '{"size": 3}',
    "chat_template.jinja": "{{ messages }}{# as it was #}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "generation_config.json": '{"eos_token_id": [2, 7],    "max_new_tokens": 11}',
}


def words(folder: Path) -> None:
    """A tokenizer whose files are not as transformers 5 would write them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "expert": 2, "router": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "pad_token": "[PAD]", "extra": 1}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = qwen3_moe(tmp_path_factory.mktemp("furnished") / "source")
    words(folder)
    for name, text in BESIDE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    head = "---\nlicense: other\nlicense_name: mine\nbase_model: someone/large\ntags: [x]\n---\n"
    (folder / "README.md").write_text(head + "# The secret of this model\n")
    return folder


@EITHER
def test_what_was_not_changed_is_copied_byte_for_byte(streamed: bool, furnished: Path, tmp_path: Path) -> None:
    view = moestro.open(furnished, stream=streamed)
    view.keep_experts({layer.index: [0, 3, 5, 6] for layer in view.layers})
    view.save(tmp_path / "out")
    for name in (*BESIDE, "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (furnished / name).read_bytes(), name


def test_a_changed_tokenizer_and_generation_config_are_written_anew(furnished: Path, tmp_path: Path) -> None:
    view = moestro.open(furnished)
    view.tokenizer.chat_template = "{{ other }}"
    view.model.generation_config.max_new_tokens = 12
    view.save(tmp_path / "out")
    again = moestro.open(tmp_path / "out")
    assert again.tokenizer.chat_template == "{{ other }}"
    assert again.model.generation_config.max_new_tokens == 12
    assert (tmp_path / "out" / "LICENSE").read_text() == BESIDE["LICENSE"]


@EITHER
def test_a_card_says_what_it_is(streamed: bool, furnished: Path, tmp_path: Path) -> None:
    view = moestro.open(furnished, stream=streamed)
    view.keep_experts({layer.index: [0, 3, 5, 6] for layer in view.layers})
    card = (view.save(tmp_path / "out") / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["license_name"]) == ("other", "mine")
    assert head["base_model"] == "someone/large"
    assert head["library_name"] == "transformers"
    assert "mixture-of-experts" in head["tags"]
    assert "Experts: 4 in each of 2 layers, 8 before" in card
    assert "Qwen3MoeForCausalLM.from_pretrained" in card
    assert "secret" not in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "moestro.json").read_text()


def test_the_card_of_a_fit_has_the_losses_and_none_of_the_texts(tmp_path: Path) -> None:
    texts = [{"text": f"the zebra number {i} walks " + "over the grass and back again " * 12} for i in range(40)]
    limits = dict(calibration_tokens=500, heldout_tokens=300, max_length=64, progress=False)
    fitted = moestro.fit("quartet", texts, experts="50%", rest=(), out=tmp_path / "out", **limits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "zebra" not in card
    assert "grass" not in card
    (loss,) = fitted.report.losses
    assert f"| {loss.before:.3f} | {loss.after:.3f} |" in card
    assert "50% of the experts" in card


# --- tensors that transformers does not load -------------------------------------------------------------------------


def with_predictor(folder: Path, style: str) -> Path:
    """A checkpoint with a next-token-prediction layer: behind the trunk (DeepSeek, GLM), or under `mtp.` (Qwen)."""
    family = "deepseek_v3" if style == "behind" else "qwen3_moe"
    make(family).model.save_pretrained(folder)
    to = "model.layers.3." if style == "behind" else "mtp.layers.0."

    def add(held: dict[str, Tensor]) -> None:
        held |= {
            n.replace("model.layers.2.", to): t.clone() for n, t in held.items() if n.startswith("model.layers.2.")
        }
        held[f"{to}eh_proj.weight"] = torch.randn(96, 192)

    return edit(
        folder, tensors=add, **{"num_nextn_predict_layers" if style == "behind" else "mtp_num_hidden_layers": 1}
    )


@pytest.mark.parametrize("style", ["behind", "mtp"])
@EITHER
def test_a_predictor_is_carried_or_left_out_with_a_word(style: str, streamed: bool, tmp_path: Path) -> None:
    source = with_predictor(tmp_path / "source", style)
    name = "num_nextn_predict_layers" if style == "behind" else "mtp_num_hidden_layers"
    there = re.compile(r"layers\.3\." if style == "behind" else r"^mtp\.")
    before = {n: t for n, t in load_file(source / WEIGHTS).items() if there.search(n)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        view = moestro.open(source, stream=streamed)
        view.save(tmp_path / "whole")
    after = load_file(tmp_path / "whole" / WEIGHTS)
    assert before
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert json.loads((tmp_path / "whole" / "config.json").read_text())[name] == 1
    assert view.num_bytes == sum(t.nbytes for t in after.values())
    view.keep_experts({layer.index: [0, 1, 4, 5] for layer in view.layers})
    with pytest.warns(UserWarning, match=rf"next-token-prediction.*{name}=0"):
        view.save(tmp_path / "half")
    half = load_file(tmp_path / "half" / WEIGHTS)
    assert not [n for n in half if there.search(n)]
    assert json.loads((tmp_path / "half" / "config.json").read_text())[name] == 0
    assert view.num_bytes == sum(t.nbytes for t in half.values())
    assert "next-token-prediction" in json.loads((tmp_path / "half" / "moestro.json").read_text())["left_out"][0]
    assert "next-token-prediction" in (tmp_path / "half" / "README.md").read_text()


@EITHER
def test_other_tensors_that_nobody_loads_are_carried_or_named(streamed: bool, tmp_path: Path) -> None:
    source = qwen3_moe(tmp_path / "source")
    more = {"score.weight": torch.randn(2, 160), "model.layers.0.mlp.experts.3.input_maximum": torch.randn(1)}
    edit(source, tensors=lambda held: held | more)
    view = moestro.open(source, stream=streamed)
    view.keep_experts({layer.index: [0, 3, 5, 6] for layer in view.layers})
    with pytest.warns(UserWarning, match=r"left out.*experts.3.input_maximum"):
        view.save(tmp_path / "out")
    saved = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(saved["score.weight"], more["score.weight"])
    assert "model.layers.0.mlp.experts.3.input_maximum" not in saved


def test_a_tower_is_left_out_with_a_word_where_the_text_model_alone_is_saved(tmp_path: Path) -> None:
    whole = families.build("qwen3_5_moe", towers=True).model
    whole.save_pretrained(tmp_path / "source")
    text = transformers.Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "source")
    view = moestro.open(text)
    with pytest.warns(UserWarning, match=r"left out.*another class.*visual"):
        view.save(tmp_path / "out")
    again = transformers.Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), text.state_dict().values()))


def test_a_predictor_of_a_quantised_source_is_carried_in_either_format(tmp_path: Path) -> None:
    source = qwen3_moe(tmp_path / "source")

    def add(held: dict[str, Tensor]) -> None:
        held |= {n.replace("model.layers.1.", "mtp.layers.0."): t.clone() for n, t in held.items() if ".layers.1." in n}

    quantised.to_fp8(edit(source, tensors=add, mtp_num_hidden_layers=1))
    stored, view = load_file(source / WEIGHTS), moestro.open(source)
    view.save(tmp_path / "same", format="source")
    assert {n: t.dtype for n, t in load_file(tmp_path / "same" / WEIGHTS).items()} == {
        n: t.dtype for n, t in stored.items()
    }
    plain = load_file(view.save(tmp_path / "plain") / WEIGHTS)
    name = "mtp.layers.0.mlp.experts.2.up_proj.weight"
    assert torch.equal(plain[name], quantised.fp8_values(stored, name).bfloat16())


# --- proof ------------------------------------------------------------------------------------------------------------


def test_what_transformers_would_not_read_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moestro.formats.hf as hf

    view, right = moestro.open(make("qwen3_moe").model), hf.to_stored

    def wrong(model: Any, tensors: Any) -> dict[str, Tensor]:
        return {name.replace("k_norm", "key_norm"): tensor for name, tensor in right(model, tensors).items()}

    monkeypatch.setattr(hf, "to_stored", wrong)
    with pytest.raises(RuntimeError, match=r"k_norm.weight is missing"):
        view.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())
