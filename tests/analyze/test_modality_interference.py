"""Interventions change what they say and nothing else; a model that follows them is told from one that does not."""

import math

import numpy as np
import pytest
import torch

import moestro
import tiny
from moestro.analyze import modality_interference as inter
from moestro.analyze.profiles import TextProfiles
from moestro.analyze.questions import Question, decision
from moestro.evidence import modality_interference as evidence

CHOICES = ("cat", "dog", "owl", "bee")


def pictures(count: int = 40) -> list[Question]:
    """Pictures whose brightness is the number of the right choice."""
    values = np.random.default_rng(0).integers(0, 4, count).tolist()
    return [
        Question(f"q{i}", "What is it?", {"image": np.full((8, 8), v / 3)}, CHOICES, v) for i, v in enumerate(values)
    ]


def looks(questions) -> list[list[float]]:
    """Looks at the picture alone."""
    return [np.eye(4)[round(float(q.sources["image"].mean()) * 3)].tolist() for q in questions]


def believes(questions) -> list[list[float]]:
    """Believes the text where it names a choice, and looks otherwise."""
    replies = looks(questions)
    for i, q in enumerate(questions):
        named = [n for n, choice in enumerate(q.choices) if choice in q.text]
        if named:
            replies[i] = np.eye(4)[named[0]].tolist()
    return replies


def test_a_model_that_believes_text_is_told_from_one_that_looks() -> None:
    suite = inter.text_perturbations()
    report = inter.interference_report(believes, pictures(), suite, progress=False)
    assert [*report] == ["asked again", "unrelated", "misleading", "scanned", "agreeing"]
    for name in ("asked again", "unrelated", "agreeing"):
        assert report[name].accuracy.estimate == 1.0
        assert report[name].change_rate.estimate == report[name].divergence.estimate == 0.0
    for name in ("misleading", "scanned"):
        found = report[name]
        assert found.accuracy.estimate == 0.0
        assert found.loss.estimate == found.change_rate.estimate == found.followed.estimate == 1.0
        assert found.divergence.estimate == pytest.approx(math.log(2))
    steady = inter.interference_report(looks, pictures(), suite, progress=False)
    assert all(f.change_rate.estimate == f.loss.estimate == 0.0 for f in steady.values())
    assert steady["misleading"].followed.estimate == 0.0


def test_the_report_has_intervals_and_a_table() -> None:
    def unsure(questions):
        return [0 if "dog" in q.text else decision(r) for q, r in zip(questions, looks(questions))]

    report = inter.interference_report(unsure, pictures(), inter.text_perturbations(), progress=False)
    rate = report["misleading"].change_rate
    assert 0 < rate.low < rate.estimate < rate.high < 1
    assert report["misleading"].divergence is None  # numbers of choices, no probabilities
    table = inter.as_table(report)
    assert set(table["measure"]) == {"accuracy", "loss", "change_rate", "followed"}
    assert set(table["perturbation"]) == set(report)


def test_dice_show_in_the_control() -> None:
    rng = np.random.default_rng(1)
    report = inter.interference_report(
        lambda qs: rng.integers(0, 4, len(qs)).tolist(), pictures(200), inter.text_perturbations(), progress=False
    )
    assert report["asked again"].change_rate.low > 0.6
    assert not report["misleading"].followed.excludes_zero


def test_misleading_text_names_a_wrong_choice_and_agreeing_text_the_right_one() -> None:
    suite = inter.text_perturbations()
    for name, right in (("misleading", False), ("scanned", False), ("agreeing", True)):
        made = inter.perturb(pictures(), suite[name])
        for original, question, towards in zip(pictures(), *made):
            assert (towards == original.answer) is right
            assert question.choices[towards] in question.text
            assert question.text.endswith(original.text)
            assert (question.answer, question.choices) == (original.answer, original.choices)
            assert np.array_equal(question.sources["image"], original.sources["image"])
    drawn = [inter.perturb(pictures(), suite["misleading"], seed=s).towards for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_equal_choices_do_not_mislead() -> None:
    question = Question("q", "?", {}, ("cat", "cat", "dog"), 0)
    assert {inter.wrong_choice(question, np.random.default_rng(s)) for s in range(20)} == {2}


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(8, 8), (16, 12, 3), (3, 16, 12)])
def test_pictures_are_replaced_in_their_own_range(dtype, shape) -> None:
    top = 255 if dtype is np.uint8 else 1.0
    own = np.full(shape, top, dtype)
    other = np.zeros(shape, dtype)
    question = Question("q", "How much is two and two?", {"image": own}, ("three", "four"), 1)
    suite = inter.picture_perturbations(pictures=[own, other])
    made = {name: inter.perturb([question], p).questions[0].sources["image"] for name, p in suite.items()}
    assert {m.shape for m in made.values()} == {shape}
    assert {m.dtype for m in made.values()} == {np.dtype(dtype)}
    assert made["black"].max() == 0
    assert made["white"].min() == top
    assert made["swapped"] is not own
    assert made["swapped"].max() == 0
    assert made["random pixels"].std() > top / 5
    assert 0 < made["screen"].min() < made["screen"].max() < top
    assert np.array_equal(question.sources["image"], own)


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    m = (p + q) / 2
    by_hand = sum(0.5 * float((x * (x / m).log()).nansum()) for x in (p, q))
    assert float(inter.jensen_shannon(p, q)) == pytest.approx(by_hand)
    assert float(inter.jensen_shannon(p, p)) == 0
    assert float(inter.jensen_shannon(torch.eye(2)[0], torch.eye(2)[1])) == pytest.approx(math.log(2))


def test_text_moves_the_routing_of_what_comes_after_it_and_nothing_before() -> None:
    view = moestro.open(tiny.make("qwen3_moe").model)
    words = torch.randint(2, 100, (6, 8), generator=torch.Generator().manual_seed(0))
    kept = torch.arange(100, 104).expand(6, 4)  # what stands for the image tokens
    first, second = words.clone(), words.clone()
    second[:, :4] = words[:, :4].flip(0)

    def profiles(text, before: bool):
        ids = torch.cat([text, kept] if before else [kept, text], dim=1)
        return view.observe([ids], [TextProfiles(skip=range(100))], progress=False)[0]

    clean, again = profiles(first, True), profiles(first, True)
    assert clean.tokens.tolist() == [4] * 6
    moved = inter.routing_shift(clean, profiles(second, True), again)
    last = max(moved)
    assert moved[last].perturbed.low > 1e-6
    assert moved[last].control.estimate == pytest.approx(0, abs=1e-9)
    assert moved[last].excess.excludes_zero
    behind = inter.routing_shift(profiles(first, False), profiles(second, False), profiles(first, False))
    assert all(shift.perturbed.estimate == pytest.approx(0, abs=1e-9) for shift in behind.values())
    with pytest.raises(ValueError, match="the perturbed profiles are of 6 texts with 72 tokens"):
        inter.routing_shift(
            clean, view.observe([torch.cat([first, kept], 1)], [TextProfiles()], progress=False)[0], again
        )


def test_what_is_fine_tuned_on_is_not_what_is_tested_on() -> None:
    learned, tested = evidence.vlm.split(3)
    assert not {p.tobytes() for p in learned.images} & {p.tobytes() for p in tested.images}
    asked = evidence.vlm.questions(evidence.IMAGE_HEAVY, learned, 20, seed=0)
    templates = {"learned": evidence.vlm.TRAINED_TEXTS, "tested": evidence.vlm.TESTED_TEXTS}
    assert not {*templates["learned"]} & {*templates["tested"]}
    for part, own in templates.items():
        made = inter.perturb(asked, evidence.suites(part, learned)[evidence.IMAGE_HEAVY]["misleading"])
        for question, towards in zip(*made):
            said = question.text.split(" <image>")[0]
            assert said in {text.format(question.choices[towards]) for text in own}
    assert [*evidence.suites("learned", learned)[evidence.TEXT_HEAVY]] == [*evidence.CLAIMED[evidence.TEXT_HEAVY]]


def test_captions_of_the_base_model_are_right_as_often_as_it_is_said() -> None:
    rng, (learned, _) = np.random.default_rng(0), evidence.vlm.split(0)
    made = [evidence._as_found(evidence.IMAGE_HEAVY, learned, rng) for _ in range(600)]
    captions = [(q.text.split("<image>")[0].split(), q.right) for q in made if not q.text.startswith("<image>")]
    assert len(captions) / 600 == pytest.approx(evidence.CAPTIONED, abs=0.06)
    assert np.mean([right in words for words, right in captions]) == pytest.approx(evidence.CAPTION_RIGHT, abs=0.04)


def test_the_image_tokens_alone_are_profiled() -> None:
    torch.manual_seed(0)
    model = evidence.vlm.DigitVLM(hidden=16).eval()
    asked = evidence.vlm.questions(evidence.IMAGE_HEAVY, evidence.vlm.split(0)[0], 3, seed=0)
    profiles = evidence.profiles_of_pictures(model, asked)
    assert profiles.tokens.tolist() == [16.0] * 3
    other = [q.given("image", 1 - q.sources["image"]) for q in asked]
    behind = [evidence.replace(q, text=q.text + " plus two") for q in asked]
    moved, same = (evidence.profiles_of_pictures(model, questions) for questions in (other, behind))
    assert not torch.allclose(moved.importance[0], profiles.importance[0], atol=1e-4)
    torch.testing.assert_close(same.importance[2], profiles.importance[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: inter.interference_report(looks, [], {}), "no questions"),
        (lambda q: inter.interference_report(looks, q[:1], {}), "two or more"),
        (lambda q: inter.text_perturbations(fact_count=99), "fact_count=99 of 14"),
        (
            lambda q: inter.wrong_choice(Question("q7", "?", {}, ("cat",), 0), np.random.default_rng(0)),
            "'q7' has no wrong",
        ),
        (lambda q: inter.perturb([q[0].only([])], inter.picture_perturbations()["black"]), "neutral picture"),
        (
            lambda q: inter.perturb(q, inter.picture_perturbations(pictures=[q[0].sources["image"]])["swapped"]),
            "none of the 1 pictures differs",
        ),
        (lambda q: inter.interference_report(lambda qs: [0], q, {}), "1 replies to 40 questions"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(pictures())
