"""The adversary stays where it may be, the consistency is its equation, and training on both changes what it should."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tiny
from moestro.analyze.modality_interference import text_perturbations
from moestro.evidence import digit_vlm
from moestro.tune import modality_robustness as mr
from moestro.tune.modality_robustness import BOTH, IGNORED, IMAGE, IMAGE_HEAVY, NEITHER, TEXT, TEXT_HEAVY


@pytest.fixture
def model() -> digit_vlm.DigitVLM:
    return digit_vlm.DigitVLM(hidden=16).eval()


def digits(*kinds: int, prefix: tuple[str, ...] = (), origin=None, seed: int = 0) -> mr.ModalityBatch:
    rng = np.random.default_rng(seed)
    asked = [digit_vlm.question(kind, digit_vlm.split(0)[0], str(i), rng) for i, kind in enumerate(kinds)]
    if origin is not None:
        asked = [asked[o] for o in origin]
    asked = [replace(q, text=f"{p} {q.text}") if p else q for q, p in zip(asked, prefix or [""] * len(asked))]
    return digit_vlm.collate(asked, kinds, origin)


class Reader(nn.Module):
    """Embeddings, a mean over what came before, a head: a decoder small enough to reckon by hand."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

        def forward(self, input_ids=None, inputs_embeds=None, use_cache=False):
            embeds = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
            count = torch.arange(1, embeds.shape[1] + 1)[:, None]
            return SimpleNamespace(last_hidden_state=embeds.cumsum(1) / count)

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.head = self.Decoder(), nn.Linear(4, 9)

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.head(self.decoder(input_ids=input_ids).last_hidden_state))


def read(ids, answers, kind, origin) -> mr.ModalityBatch:
    """Rows of ids whose last `answers` tokens are the answer; id 8 is an image token, 0 padding on the left."""
    ids = torch.tensor(ids)
    labels = ids.clone()
    labels[:, :-answers] = IGNORED
    modality = torch.where(ids == 8, IMAGE, TEXT).masked_fill(ids == 0, NEITHER)
    return mr.ModalityBatch({"input_ids": ids}, labels, modality, torch.tensor(kind), torch.tensor(origin))


def test_the_mask_is_the_input_that_does_not_matter() -> None:
    batch = read([[0, 8, 2, 5], [0, 8, 2, 5], [0, 8, 2, 5]], 1, [IMAGE_HEAVY, TEXT_HEAVY, BOTH], [0, 1, 2])
    assert mr.adversary_mask(batch).int().tolist() == [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("adversary", [mr.PGD(alpha=50.0, eps=0.05), mr.PGD(eps=0.05, sign=True), mr.Gaussian()])
def test_the_adversary_leaves_rows_that_need_both_inputs_alone(model, adversary) -> None:
    batch = digits(IMAGE_HEAVY, TEXT_HEAVY, BOTH, BOTH)
    mask = mr.adversary_mask(batch)
    noise, _ = mr.adversarial_noise(adversary, model, batch)
    assert noise[~mask].abs().max() == 0
    assert (noise.abs().sum(dim=2) > 0).equal(mask)
    clean, hard = mr.answers(model, batch), mr.answers(model, batch, noise)
    # experts round by how many tokens they serve at once
    torch.testing.assert_close(hard.logits[2:], clean.logits[2:], rtol=0, atol=1e-5)
    assert (hard.logits[:2] != clean.logits[:2]).any(dim=1).all()
    if isinstance(adversary, mr.PGD):
        assert noise.abs().max() <= adversary.eps
    assert tiny.hooks_on(model) == 0


def test_a_step_of_the_search_is_its_equation() -> None:
    slope, like = torch.tensor([[[0.002, -3.0]]]), torch.zeros(1, 1, 2)
    start, first = mr.PGD(steps=0, eps=0.01)(lambda n: n.sum(), like, torch.Generator().manual_seed(1))
    assert first is None
    again = torch.Generator().manual_seed(1)
    found, first = mr.PGD(alpha=0.1, eps=0.01, steps=1)(lambda n: (slope * n).sum(), like, again)
    assert first == pytest.approx(float((slope * start).sum()))
    torch.testing.assert_close(found, (start + 0.1 * slope).clamp(-0.01, 0.01))
    again.manual_seed(1)
    signed, _ = mr.PGD(alpha=0.1, eps=0.01, steps=1, sign=True)(lambda n: (slope * n).sum(), like, again)
    torch.testing.assert_close(signed, torch.tensor([[[0.01, -0.01]]]))


def test_the_search_raises_the_loss_above_its_random_start_and_touches_no_weight(model) -> None:
    batch = digits(*[IMAGE_HEAVY, TEXT_HEAVY] * 4)
    loss = mr.ModalityRobustnessLoss(adversary=mr.PGD(alpha=1.0, eps=0.02, steps=4, sign=True))
    terms = loss(model, batch)
    assert terms.rise > terms.random_rise
    assert terms.rise > 0
    assert all(p.grad is None for p in model.parameters())
    weak = mr.ModalityRobustnessLoss(adversary=mr.PGD())(model, batch)
    assert abs(weak.rise) < terms.rise


def test_weights_get_the_gradient_of_clean_and_adversarial_loss(model) -> None:
    batch = digits(IMAGE_HEAVY, TEXT_HEAVY, BOTH)
    loss = mr.ModalityRobustnessLoss(adversary=mr.PGD(eps=0.05), generator=torch.Generator().manual_seed(3))
    loss(model, batch).loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss.generator.manual_seed(3)
    noise, _ = mr.adversarial_noise(loss.adversary, model, batch, loss.generator)
    (mr.answers(model, batch).loss + mr.answers(model, batch, noise.detach()).loss).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-5, atol=1e-7)


def test_predictions_are_read_one_place_before_the_answer(model) -> None:
    batch = digits(IMAGE_HEAVY, BOTH)
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    last = batch.inputs["attention_mask"].sum(dim=1) - 1
    expected = logits[torch.arange(2), last - 1]
    found = mr.answers(model, batch)
    torch.testing.assert_close(found.logits, expected)
    target = batch.inputs["input_ids"][torch.arange(2), last]
    torch.testing.assert_close(found.loss, F.cross_entropy(expected, target))


def test_divergences_are_their_equations_and_pull_the_perturbed_side_alone() -> None:
    q, p = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7)
    expected = F.kl_div(p.log_softmax(-1), q.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(mr.kl(q, p), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mr.kl(q, p), mr.kl(p, q.detach()), rtol=1e-2)
    torch.testing.assert_close(mr.js(q, p), mr.js(p, q), rtol=1e-4, atol=1e-6)
    far = mr.js(torch.tensor([[30.0, 0.0]]), torch.tensor([[0.0, 30.0]]))
    assert float(far) == pytest.approx(math.log(2), abs=1e-4)
    for divergence in mr.DIVERGENCES.values():
        assert divergence(p, p).abs().max() < 1e-6
        assert (divergence(q, p) > 0).all()
    torch.testing.assert_close(mr.mse(q, p)[1], (q[1] - p[1]).pow(2).mean())


@pytest.mark.parametrize("consistency", [*mr.DIVERGENCES])
def test_answers_are_compared_token_by_token_wherever_a_prefix_moved_them(consistency) -> None:
    model = Reader()
    rows = [[0, 0, 3, 5, 6], [0, 4, 3, 5, 6], [4, 4, 3, 5, 6], [0, 0, 1, 5, 7], [0, 2, 1, 5, 7]]
    batch = read(rows, 2, [IMAGE_HEAVY] * 5, [0, 0, 0, 3, 3])
    terms = mr.ModalityRobustnessLoss(consistency=consistency, weight=0.5)(model, batch)
    found = mr.answers(model, batch)
    states = (found.hidden if consistency == "mse" else found.logits).view(5, 2, -1)
    d = mr.DIVERGENCES[consistency]
    of = {0: [d(states[i], states[0]) for i in (1, 2)], 3: [d(states[4], states[3])]}
    by_hand = torch.stack([torch.cat(copies).mean() for copies in of.values()]).mean().item()
    assert terms.consistency == pytest.approx(by_hand, rel=1e-5)
    assert float(terms.loss) == pytest.approx(terms.supervised + 0.5 * by_hand, rel=1e-5)
    assert by_hand > 0


def test_answers_at_different_places_are_aligned() -> None:
    early = torch.tensor([[1, 2, 5, 6, 0, 0], [3, 1, 2, 4, 5, 6]])
    labels = torch.tensor([[IGNORED, IGNORED, 5, 6, IGNORED, IGNORED], [IGNORED] * 4 + [5, 6]])
    modality = torch.where(early == 0, NEITHER, TEXT)
    batch = mr.ModalityBatch({"input_ids": early}, labels, modality, torch.tensor([0, 0]), torch.tensor([0, 0]))
    row, of_clean = mr._aligned(batch)
    assert (row.tolist(), of_clean.tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])


def test_the_clean_side_gets_no_gradient_and_an_equal_copy_no_loss() -> None:
    model = Reader()
    batch = read([[0, 3, 5], [0, 3, 5]], 1, [IMAGE_HEAVY] * 2, [0, 0])
    assert mr.ModalityRobustnessLoss(consistency="js")(model, batch).consistency == pytest.approx(0, abs=1e-7)
    apart = read([[0, 3, 5], [4, 3, 5]], 1, [IMAGE_HEAVY] * 2, [0, 0])
    clean, found = (mr.answers(model, apart) for _ in range(2))
    mixed = mr.Pass(found.logits, found.hidden, found.loss)
    value, _ = mr.ModalityRobustnessLoss(consistency="kl")._consistency(apart, clean, mixed)
    clean.logits.retain_grad()
    found.logits.retain_grad()
    value.backward()
    assert clean.logits.grad[0].abs().max() == 0  # row 0 is the reference, row 1 the copy that learns
    assert clean.logits.grad[1].abs().max() > 0
    assert found.logits.grad.abs().max() > 0


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    model = Reader()
    with torch.no_grad():
        model.decoder.embed.weight[4] = float("inf")
    batch = read([[0, 3, 5], [4, 3, 5], [2, 3, 5]], 1, [IMAGE_HEAVY] * 3, [0, 0, 0])
    terms = mr.ModalityRobustnessLoss(consistency="kl")(model, batch)
    assert terms.skipped == 1
    assert math.isfinite(terms.consistency)
    with pytest.raises(FloatingPointError, match="step 0"):
        mr.train_modality_robust(model, [batch], mr.ModalityRobustnessLoss(), progress=False)


def test_it_works_on_a_transformers_model_with_pictures() -> None:
    text = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=49))
    ids = torch.tensor([[1, 49, 49, 49, 49, 7, 8, 9]] * 3)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = ids[:, -1]
    inputs = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 4, 4), "attention_mask": torch.ones_like(ids)}
    modality = torch.where(ids == 49, IMAGE, TEXT).masked_fill(ids == 1, NEITHER)
    kinds = torch.tensor([IMAGE_HEAVY, TEXT_HEAVY, BOTH])
    batch = mr.ModalityBatch(inputs, labels, modality, kinds, torch.arange(3))
    loss = mr.ModalityRobustnessLoss(consistency="js", adversary=mr.PGD(eps=0.1))
    noise, _ = mr.adversarial_noise(loss.adversary, model, batch, loss.generator)
    clean, hard = mr.answers(model, batch), mr.answers(model, batch, noise)
    assert (clean.logits != hard.logits).any(dim=1).tolist() == [True, True, False]
    history = mr.train_modality_robust(model, [batch] * 20, loss, rate=2e-2, progress=False)
    assert history[-1].supervised < history[0].supervised / 2
    assert history[-1].adversarial < history[0].adversarial / 2


def test_the_same_ids_with_and_without_embeddings_given() -> None:
    model = Reader()
    batch = read([[0, 3, 5]], 1, [IMAGE_HEAVY], [0])
    noise = torch.randn(1, 3, 4)
    plain = model.decoder.embed(batch.inputs["input_ids"]) + noise
    expected = model.head(plain.cumsum(1) / torch.tensor([[1.0], [2.0], [3.0]]))[0, 1]
    torch.testing.assert_close(mr.answers(model, batch, noise).logits[0], expected)
    with pytest.raises(ValueError, match="modality_ids tell of"):
        mr.answers(model, batch, torch.zeros(1, 2, 4))


def test_batches_keep_the_proportions_and_use_every_row_once_before_any_twice() -> None:
    seen: list[list[int]] = [[], [], []]
    for rows in mr.anchored_rows([6, 6, 12], 3, seed=1):
        assert [len(r) for r in rows] == [2, 2, 4]
        for all_rows, r in zip(seen, rows):
            all_rows += r
    assert [sorted(r) for r in seen] == [list(range(6)), list(range(6)), list(range(12))]
    repeat = [list(mr.anchored_rows([6, 6, 12], 2, seed=s)) for s in (1, 1, 2)]
    assert repeat[0] == repeat[1] != repeat[2]


def test_augmented_rows_follow_their_originals() -> None:
    asked = digit_vlm.questions(IMAGE_HEAVY, digit_vlm.split(0)[0], 5, seed=0)
    suite = text_perturbations(facts=digit_vlm.TRAINED_FACTS, fact_count=1, misleading=digit_vlm.TRAINED_TEXTS)
    rows, origin = mr.augmented(asked, suite, copies=2, seed=1)
    assert rows[:5] == asked
    assert origin == [*range(5)] * 3
    for row, o in zip(rows[5:], origin[5:]):
        assert row.right == asked[o].right
        assert row.text != asked[o].text
        assert row.text.endswith(asked[o].text)


def test_training_returns_its_history_and_the_model_as_it_was(model) -> None:
    batches = [digits(IMAGE_HEAVY, TEXT_HEAVY, BOTH, BOTH)] * 30
    history = mr.train_modality_robust(model, batches, mr.ModalityRobustnessLoss(), rate=1e-2, progress=False)
    assert len(history) == 30
    assert history[-1].supervised < history[0].supervised * 0.7
    assert history[0].rise is history[0].consistency is None
    assert not model.training
    assert tiny.hooks_on(model) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: read([[1, 5], [1, 5]], 1, [0, 0], [0, 2]), "origin="),
        (lambda: read([[1, 5], [1, 5], [1, 5]], 1, [0, 0, 0], [1, 2, 2]), "names itself"),
        (lambda: read([[1, 5]], 1, [3], [0]), "kind="),
        (lambda: read([[5]], 1, [0], [0]), "row 0 has no answer token"),
        (
            lambda: mr.ModalityBatch(
                {},
                torch.tensor([[IGNORED, 4, 5], [IGNORED, IGNORED, 5]]),
                torch.zeros(2, 3, dtype=torch.long),
                torch.zeros(2, dtype=torch.long),
                torch.tensor([0, 0]),
            ),
            "the answer of row 1 has 1 tokens, that of its clean row 0 2",
        ),
        (lambda: mr.ModalityRobustnessLoss(weight=-1.0), "weight=-1.0"),
        (lambda: mr.PGD(eps=0.0), "must be positive"),
        (lambda: next(mr.anchored_rows([1, 1, 1], 1, batch_size=6)), "cannot be split"),
        (lambda: next(mr.anchored_rows([1, 0, 1], 1)), "kind 1 has a share of 2"),
        (lambda: mr.augmented([], {}), "0 perturbations"),
        (lambda: mr.train_modality_robust(Reader(), [], mr.ModalityRobustnessLoss()), "0 batches"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
