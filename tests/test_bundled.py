"""The bundled models: plain checkpoints, as good as their cards say, and quartet's experts really specialise."""

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moestro.bundled import NAMES, bundled_path
from moestro.data import embedded, embedded_domains, token_batches
from moestro.data.parallel import parallel_strings
from moestro.data.tasks import chat
from moestro.train.measure import measure, mutual_information

CHECKED = ("code", "ui-zh", "arithmetic")  # a few domains: the card's whole table takes a minute


@lru_cache
def loaded(name: str):
    """The model in fp32, as it was measured, and its tokenizer."""
    path = bundled_path(name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def measured(name: str) -> dict:
    return json.loads((Path(bundled_path(name)) / "measured.json").read_text())


def batches(tokenizer, domains, *, documents: int | None = None):
    chosen = [d for domain in domains for d in embedded(domain, split="heldout")[:documents]]
    return token_batches(chosen, tokenizer, max_length=512, batch_size=16)


def test_the_models_are_small_and_stored_in_bf16() -> None:
    sizes = [(Path(bundled_path(name)) / "model.safetensors").stat().st_size for name in NAMES]
    assert sum(sizes) <= 40e6
    for name in NAMES:
        assert json.loads((Path(bundled_path(name)) / "config.json").read_text())["dtype"] == "bfloat16"


def test_transformers_4_and_others_find_the_names_that_they_read() -> None:
    for name in NAMES:
        folder = Path(bundled_path(name))
        config = json.loads((folder / "config.json").read_text())
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
        assert config["torch_dtype"] == config["dtype"]
        assert config.get("num_experts") == config.get("num_local_experts")
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert isinstance(tokenizer.get("extra_special_tokens", {}), dict)  # 4 takes no list there


def test_solo_has_quartets_active_parameters() -> None:
    quartet, solo = (loaded(name)[0].config for name in ("quartet", "solo"))
    assert solo.intermediate_size == quartet.num_experts_per_tok * quartet.moe_intermediate_size
    for shared in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert getattr(solo, shared) == getattr(quartet, shared)
    assert measured("quartet")["tokens"] == measured("solo")["tokens"] >= 20_000_000


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_are_those_of_the_card(name: str) -> None:
    model, tokenizer = loaded(name)
    losses = measure(model, batches(tokenizer, CHECKED)).losses
    card = measured(name)["heldout_loss"]
    for domain in CHECKED:
        assert losses[domain] == pytest.approx(card[domain], abs=0.01)  # fp32 on any machine


def test_quartet_beats_solo_on_every_domain_together() -> None:
    quartet, solo = (measured(name)["heldout_loss"] for name in ("quartet", "solo"))
    assert set(quartet) == set(solo) == set(embedded_domains())
    assert sum(quartet.values()) < sum(solo.values())


def test_experts_tell_domains_apart() -> None:
    model, tokenizer = loaded("quartet")
    found = measure(model, batches(tokenizer, embedded_domains(), documents=6))
    for counts, shuffled in zip(found.counts, found.shuffled, strict=True):
        assert mutual_information(counts) > 2 * mutual_information(shuffled)
    domains = embedded_domains()
    most_used = found.counts[-1].argsort(1)[:, -4:]
    code, chinese = (set(most_used[domains.index(domain)]) for domain in ("code", "ui-zh"))
    assert code != chinese


def test_the_tokenizer_round_trips_text_of_every_domain() -> None:
    _, tokenizer = loaded("quartet")
    for domain in embedded_domains():
        for document in embedded(domain)[:20]:
            ids = tokenizer(document.text).input_ids
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.decode(ids) == tokenizer.bos_token + document.text
            assert max(ids) < loaded("quartet")[0].config.vocab_size


def test_both_models_share_one_tokenizer() -> None:
    files = [(Path(bundled_path(name)) / "tokenizer.json").read_text() for name in NAMES]
    assert files[0] == files[1]


def test_a_chat_turn_ends_by_itself() -> None:
    model, tokenizer = loaded("quartet")
    question = "What is 12 plus 30?"
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == tokenizer.bos_token + chat(question, "").prompt
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
    assert int(out[0, -1]) in model.generation_config.eos_token_id
    assert out.shape[1] - ids.shape[1] < 64


def test_calibration_and_heldout_share_no_document_and_cover_every_domain() -> None:
    calibration, heldout = (embedded(split=split) for split in ("calibration", "heldout"))
    assert not {d.text for d in calibration} & {d.text for d in heldout}
    assert {d.domain for d in calibration} == {d.domain for d in heldout} == set(embedded_domains())


def test_parallel_strings_say_the_same_in_many_languages() -> None:
    strings = parallel_strings()
    assert len(strings) >= 1000
    assert all(len(string) >= 9 and "en" in string for string in strings)
    assert all(set(string) == {"en", "ja"} for string in parallel_strings(["en", "ja"]))
    with pytest.raises(ValueError, match="xx"):
        parallel_strings(["xx"])
