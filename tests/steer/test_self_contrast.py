"""Self-contrast: the contrasted tokens are those of two passes without any cache, whatever way they are generated."""

import copy

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

import moestro
import tiny
from moestro import SwitchOff
from moestro.steer.reroute import random_expert, rank, top_k, top_p
from moestro.steer.self_contrast import contrast, contrastive, routing_divergence, self_contrast
from tiny import FP32, LEARNED, documents, padded

INPUTS = padded(documents(7, 3, 9), "left")
NEW = 6
OPTIONS = dict(max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, eos_token_id=130)


@pytest.fixture(scope="module")
def view() -> moestro.ExpertView:
    return moestro.open(tiny.make("qwen3_moe").model)


def generate(view: moestro.ExpertView, inputs: dict[str, Tensor] = INPUTS, processors=(), **options) -> Tensor:
    options = {"do_sample": False, **OPTIONS, **options}
    return view.model.generate(**inputs, **options, logits_processor=[*processors])


def by_hand(view, weak, beta: float, alpha: float = 0.1, inputs: dict[str, Tensor] = INPUTS, amateur=None) -> Tensor:
    """Greedy self-contrast, both passes over the whole prefix at every step."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(NEW):
        position = (mask.cumsum(1) - 1).clamp(min=0)
        both = dict(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False)
        with torch.no_grad():
            strong = view.model(**both).logits[:, -1]
            with view.edits(*weak):
                other = (amateur or view.model)(**both).logits[:, -1]
        strong[:, OPTIONS["eos_token_id"]] = float("-inf")  # min_new_tokens
        keep = strong.softmax(-1) >= alpha * strong.softmax(-1).amax(-1, keepdim=True)
        scores = (strong + beta * (strong - other)).masked_fill(~keep, float("-inf"))
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids


@pytest.mark.parametrize("family", LEARNED[:3])
def test_generation_is_two_passes_without_caches(family: str) -> None:
    view = moestro.open(tiny.make(family).model)
    for k in (1, 2, 3):
        with self_contrast(view, rank(view, k), beta=3.0) as processor:
            found = generate(view, processors=[processor])
        assert torch.equal(found, by_hand(view, [rank(view, k)], 3.0))
    assert not torch.equal(found, generate(view))
    assert tiny.hooks_on(view.model) == 0


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prefill_chunk_size": 4}])
def test_any_way_of_running_the_model(view, options: dict) -> None:
    with self_contrast(view, beta=3.0) as processor:
        assert torch.equal(generate(view, processors=[processor], **options), by_hand(view, [rank(view, 2)], 3.0))


def test_sampling_draws_from_the_contrasted_scores(view) -> None:
    with self_contrast(view, beta=2.0) as processor:
        torch.manual_seed(5)
        found = generate(view, processors=[processor], do_sample=True, top_k=0)
        torch.manual_seed(5)
        out = generate(
            view, processors=[processor], do_sample=True, top_k=0, output_scores=True, return_dict_in_generate=True
        )
    assert torch.equal(found, out.sequences)
    ids, mask = (t[:, : INPUTS["input_ids"].shape[1]] for t in (out.sequences, INPUTS["attention_mask"]))
    with torch.no_grad():
        both = dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        strong = view.model(**both).logits[:, -1]
        with view.edits(rank(view, 2)):
            weak = view.model(**both).logits[:, -1]
    strong[:, OPTIONS["eos_token_id"]] = float("-inf")
    assert_close(out.scores[0], contrast(strong, weak, beta=2.0), **FP32)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": 7.0, "alpha": 1.0}])
def test_without_contrast_or_alternatives_it_is_greedy(view, settings: dict) -> None:
    with self_contrast(view, **settings) as processor:
        assert torch.equal(generate(view, processors=[processor]), generate(view))


def test_every_generation_starts_anew(view) -> None:
    other = padded(documents(5, 8, seed=1), "left")
    with self_contrast(view, beta=3.0) as processor:
        first = generate(view, processors=[processor])
        grown = {
            "input_ids": first,
            "attention_mask": torch.nn.functional.pad(INPUTS["attention_mask"], (0, NEW), value=1),
        }
        for inputs in (other, grown, INPUTS):
            assert torch.equal(generate(view, inputs, [processor]), by_hand(view, [rank(view, 2)], 3.0, inputs=inputs))


def test_a_row_does_not_depend_on_its_batch(view) -> None:
    with self_contrast(view, beta=3.0) as processor:
        batch = generate(view, processors=[processor])
        for row in range(3):
            real = INPUTS["attention_mask"][row].bool()
            alone = INPUTS["input_ids"][row][real][None]
            found = generate(view, {"input_ids": alone, "attention_mask": torch.ones_like(alone)}, [processor])
            assert torch.equal(found[0, -NEW:], batch[row, -NEW:])


def test_edits_around_it_hold_in_both_passes(view) -> None:
    off = SwitchOff({(1, 0), (1, 3), (2, 2)})
    with view.edits(off), self_contrast(view, top_k(view, 1), beta=3.0) as processor:
        found = generate(view, processors=[processor])
        assert torch.equal(found, by_hand(view, [top_k(view, 1)], 3.0))
    with self_contrast(view, top_k(view, 1), beta=3.0) as processor:
        assert not torch.equal(found, generate(view, processors=[processor]))


def test_a_chat_goes_on_with_a_cache_filled_inside_the_block(view) -> None:
    alone = {name: values[2:, 1:] for name, values in INPUTS.items()}
    more = documents(4, seed=9)[0][None]
    with self_contrast(view, beta=3.0) as processor:
        cache = DynamicCache(config=view.model.config)
        first = generate(view, alone, [processor], past_key_values=cache)
        whole = torch.cat([first, more], 1)
        inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        found = generate(view, inputs, [processor], past_key_values=cache)
    assert torch.equal(found, by_hand(view, [rank(view, 2)], 3.0, inputs=inputs))


def test_another_model_as_the_amateur(view) -> None:
    amateur = copy.deepcopy(view.model)
    with torch.no_grad():
        amateur.lm_head.weight.mul_(0.5).add_(0.05 * torch.randn_like(amateur.lm_head.weight))
    with contrastive(view.model, amateur, beta=2.0) as processor:
        found = generate(view, processors=[processor])
    assert torch.equal(found, by_hand(view, [], 2.0, amateur=amateur))
    assert tiny.hooks_on(view.model) == tiny.hooks_on(amateur) == 0


def test_the_contrast_by_hand() -> None:
    strong, weak = torch.tensor([[2.0, 1.5, -1.0]]), torch.tensor([[3.0, 1.0, -5.0]])
    expected = [[0.5 * (3 * 2.0 - 3.0), 0.5 * (3 * 1.5 - 1.0), float("-inf")]]
    assert_close(contrast(strong, weak, beta=0.5, alpha=0.1), torch.tensor(expected))
    assert contrast(strong.bfloat16(), weak.bfloat16()).dtype == torch.float32


# --- routings of one expert ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_the_ranks_are_a_permutation_of_the_experts(family: str) -> None:
    view = moestro.open(tiny.make(family).model)
    first = view.layers[0]
    most = first.num_experts // first.rule.groups * first.rule.top_groups
    found, weights = [], []
    for k in range(1, most + 1):
        with view.edits(rank(view, k)):
            (record,) = view.observe([INPUTS], [tiny.Record()])
        assert record[first.index]["indices"].shape[1] == 1
        found.append(record[first.index]["indices"][:, 0])
        weights.append(record[first.index]["weights"][:, 0])
    ranked = torch.stack(found, 1)
    assert all(len(set(row)) == most for row in ranked.tolist())
    assert_close(torch.stack(weights), torch.full((most, len(ranked)), first.rule.scale))  # families that normalise
    (plain,) = view.observe([INPUTS], [tiny.Record()])
    top = ranked[:, : first.top_k].sort(1).values
    assert torch.equal(top, plain[first.index]["indices"].sort(1).values)


def test_a_family_that_does_not_normalise_keeps_the_probability_as_the_weight() -> None:
    view = moestro.open(tiny.make("qwen3_moe", norm_topk_prob=False).model)
    with view.edits(rank(view, 3)):
        (record,) = view.observe([INPUTS], [tiny.Record()])
    for seen in record.values():
        assert_close(seen["weights"][:, 0], seen["logits"].softmax(-1).sort(-1, descending=True).values[:, 2])


def test_random_experts_are_uniform_and_come_again_with_the_seed(view) -> None:
    data = [torch.cat(documents(600)).view(4, -1)]

    def drawn(seed: int) -> Tensor:
        with view.edits(random_expert(view, seed=seed)):
            (record,) = view.observe(data, [tiny.Record()], progress=False)
        assert all((seen["weights"] == 1).all() for seen in record.values())
        return torch.cat([seen["indices"] for seen in record.values()])

    counts = drawn(0).flatten().bincount(minlength=8)
    assert ((counts / counts.sum() - 1 / 8).abs() < 0.04).all()
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_divergence_is_zero_for_the_models_own_routing_and_padding(view) -> None:
    found = routing_divergence(view, INPUTS, [top_k(view, view.layers[0].top_k), rank(view, 5), top_p(view, 1.0)])
    assert_close(found[0], torch.zeros_like(found[0]), **FP32)
    real = INPUTS["attention_mask"].bool()
    assert (found[1][real] > 0).all()
    assert (found[:, ~real] == 0).all()
    with torch.no_grad():
        p = view.model(**INPUTS).logits.log_softmax(-1)
        with view.edits(rank(view, 5)):
            q = view.model(**INPUTS).logits.log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert_close(found[1][real], kl[real], **FP32)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"beta": -0.1}, {"beta": float("nan")}, {"alpha": 0.0}, {"alpha": 1.5}])
def test_settings_without_a_meaning_are_refused(view, settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))), self_contrast(view, **settings):
        pass
    assert tiny.hooks_on(view.model) == 0


@pytest.mark.parametrize("k", [0, 9])
def test_a_rank_that_does_not_exist_is_refused(view, k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} in layer 1, whose tokens can use 1 to 8 experts"):
        rank(view, k)


def test_beam_search_is_refused(view) -> None:
    with self_contrast(view) as processor, pytest.raises(RuntimeError, match=r"beam search.*num_beams=1"):
        generate(view, processors=[processor], num_beams=2)


def test_assisted_decoding_is_refused(view) -> None:
    alone = {"input_ids": torch.tensor([[7, 8, 9] * 5]), "attention_mask": torch.ones(1, 15, dtype=torch.long)}
    with self_contrast(view) as processor, pytest.raises(RuntimeError, match="assisted decoding"):
        generate(view, alone, [processor], prompt_lookup_num_tokens=2)


def test_caches_that_the_weak_pass_cannot_follow_are_refused(view) -> None:
    alone = {name: values[2:, 1:] for name, values in INPUTS.items()}
    cache = DynamicCache(config=view.model.config)
    filled = generate(view, alone, past_key_values=cache)
    inputs = {"input_ids": filled, "attention_mask": torch.ones_like(filled)}
    with self_contrast(view) as processor, pytest.raises(ValueError, match=r"held 14 tokens .* has 0"):
        generate(view, inputs, [processor], past_key_values=cache)
    with self_contrast(view) as processor, pytest.raises(ValueError, match="StaticCache"):
        generate(view, processors=[processor], cache_implementation="static")


def test_a_second_contrast_is_refused(view) -> None:
    with self_contrast(view) as processor:
        with pytest.raises(RuntimeError, match="contrast already"), contrastive(view.model, copy.deepcopy(view.model)):
            pass
        assert torch.equal(generate(view, processors=[processor]), by_hand(view, [rank(view, 2)], 0.5))


def test_a_processor_outside_its_block_is_refused(view) -> None:
    with self_contrast(view) as processor:
        pass
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        generate(view, processors=[processor])


def test_an_amateur_of_another_vocabulary_is_refused(view) -> None:
    amateur = tiny.make("qwen3_moe", vocab_size=140).model
    with contrastive(view.model, amateur) as processor, pytest.raises(ValueError, match=r"140.* beside"):
        generate(view, processors=[processor])
