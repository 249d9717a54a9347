"""States of last tokens against those that the models themselves hand out."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import moestro
import tiny
from moestro.analyze.layer_states import LastTokenOutputs, LastTokens, decoder_layers, layer_states
from moestro.view.edit import SwitchOff

WORDS = [f"w{i}" for i in range(1, 131)]
LENGTHS = (9, 1, 14, 5)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", *WORDS])}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [" ".join(WORDS[int(i) - 1] for i in doc) for doc in tiny.documents(*LENGTHS)]


def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=131)
    return LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=131, n_positions=64)).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": dense,
    "gpt2": gpt2,
    **{f: lambda f=f: tiny.make(f).model for f in ("qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe")},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_residual_is_what_each_text_alone_gives_at_its_last_token(name: str, tokenizer, texts: list[str]) -> None:
    model = MODELS[name]()
    found = layer_states(model, tokenizer, texts, batch_size=3, progress=False)
    assert tiny.hooks_on(model) == 0
    for text in range(len(texts)):
        ids = tokenizer(texts[text], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            own = model(input_ids=ids, output_hidden_states=True).hidden_states
        for layer in range(len(own) - 2):  # the last one is after the final norm
            torch.testing.assert_close(found[layer][text], own[layer + 1][0, -1], **tiny.FP32)
    final = len(own) - 2
    norm = model.get_decoder().norm if hasattr(model.get_decoder(), "norm") else model.get_decoder().ln_f
    torch.testing.assert_close(norm(found[final][-1]), own[-1][0, -1], **tiny.FP32)


@pytest.mark.parametrize("name", MODELS)
def test_the_input_of_the_feed_forward_part_is_what_its_norm_gives(name: str, tokenizer, texts: list[str]) -> None:
    model = MODELS[name]()
    found = layer_states(model, tokenizer, texts, site="mlp_input", batch_size=2, progress=False)
    norms = [getattr(b, "post_attention_layernorm", None) or b.ln_2 for b in decoder_layers(model.get_decoder())]
    seen: list[Tensor] = []
    hooks = [n.register_forward_hook(lambda m, a, out: seen.append(out[0, -1])) for n in norms]
    try:
        for text in range(len(texts)):
            seen.clear()
            with torch.no_grad():
                model(input_ids=tokenizer(texts[text], return_tensors="pt")["input_ids"])
            for layer, vector in enumerate(seen):
                torch.testing.assert_close(found[layer][text], vector, **tiny.FP32)
    finally:
        for hook in hooks:
            hook.remove()


def test_an_open_view_gives_the_same_and_runs_under_its_edits(tokenizer, texts: list[str]) -> None:
    model = tiny.make("qwen3_moe").model
    view = moestro.open(model)
    plain, of_view = (layer_states(m, tokenizer, texts, progress=False) for m in (model, view))
    with view.edits(SwitchOff([(1, e) for e in range(4)])):
        edited = layer_states(view, tokenizer, texts, progress=False)
    for layer in plain:
        assert torch.equal(plain[layer], of_view[layer])
    assert torch.equal(plain[0], edited[0])
    assert not torch.equal(plain[1], edited[1])


def test_observed_sites_are_the_layers_own(tokenizer, texts: list[str], tmp_path) -> None:
    view = moestro.open(tiny.make("deepseek_v3").model)
    data = tiny.padded(tiny.documents(*LENGTHS))
    rules = {layer.index: layer.rule for layer in view.layers}
    reads, router, routed, record, outputs = view.observe(
        [data],
        [
            LastTokens("mlp_input"),
            LastTokens("router", rules),
            LastTokens("routed"),
            tiny.Record("outputs"),
            LastTokenOutputs(),
        ],
        progress=False,
    )
    hooked = layer_states(view, tokenizer, texts, site="mlp_input", progress=False)
    for layer in view.layers:
        own = record[layer.index]
        last = [int((own["sample"] == s).nonzero()[-1]) for s in range(len(LENGTHS))]
        torch.testing.assert_close(reads[layer.index], own["hidden"][last])
        torch.testing.assert_close(reads[layer.index], hooked[layer.index], **tiny.FP32)
        torch.testing.assert_close(routed[layer.index], own["combined"][last])
        scores = own["logits"][last].sigmoid()
        torch.testing.assert_close(router[layer.index], scores / scores.sum(1, keepdim=True))
        for e in range(layer.num_experts):
            rows = [(i, row) for i, row in enumerate(last) if e in own["indices"][row]]
            if not rows:
                assert (layer.index, e) not in outputs
                continue
            numbers, vectors = outputs[layer.index, e]
            assert numbers.tolist() == [i for i, _ in rows]
            expected = [own["outputs"][row][own["indices"][row].tolist().index(e)] for _, row in rows]
            torch.testing.assert_close(vectors, torch.stack(expected))


def test_texts_cut_over_batches_merge_to_their_last_token() -> None:
    view = moestro.open(tiny.make("qwen3_moe").model)
    ids = torch.stack([d for d in tiny.documents(8, 8)])
    part = lambda piece, samples, start: {  # noqa: E731
        "input_ids": piece,
        "sample": torch.tensor(samples),
        "start": torch.tensor(start),
    }
    first, second = LastTokens("mlp_input"), LastTokens("mlp_input")
    view.observe([part(ids[:1, 4:], [0], [4]), part(ids[1:, :4], [1], [0])], [first], progress=False)
    view.observe([part(ids[1:, 4:], [1], [4]), part(ids[:1, :4], [0], [0])], [second], progress=False)
    first.merge(second)
    (expected,) = view.observe([part(ids[:, 4:], [0, 1], [4, 4])], [LastTokens("mlp_input")], progress=False)
    for layer, vectors in first.result().items():
        torch.testing.assert_close(vectors, expected[layer], **tiny.FP32)


def test_what_has_no_such_state_is_refused(tokenizer, texts: list[str]) -> None:
    model = dense()
    with pytest.raises(ValueError, match="site='router'"):
        layer_states(model, tokenizer, texts, site="router")
    with pytest.raises(ValueError, match="text 1 is blank"):
        layer_states(model, tokenizer, ["w1", " "])
    model.config.max_position_embeddings = 8
    with pytest.raises(ValueError, match="9 tokens; the context is 8"):
        layer_states(model, tokenizer, texts)
    model.config.max_position_embeddings, model.config.num_hidden_layers = 64, 7
    with pytest.raises(ValueError, match="no list of its 7 decoder layers"):
        layer_states(model, tokenizer, texts)
    model = dense()
    model.model.layers[1].third = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"decoder layer 1 has the parts .*'third'"):
        layer_states(model, tokenizer, texts, site="mlp_input")
    model = dense()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match="ran"):
        layer_states(model, tokenizer, texts)
    with pytest.raises(ValueError, match=r"decoder layer 0 hands on \(4, 14, \d, 96\), which is not \[B, T, H\]"):
        layer_states(tiny.make("deepseek_v4").model, tokenizer, texts)  # several residual streams
    with pytest.raises(ValueError, match="site='residual'"):
        LastTokens("residual")
