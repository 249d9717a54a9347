"""Probes and depths on texts and curves that are known."""

import warnings

import numpy as np
import pytest
import torch

import moestro
import tiny
from moestro.analyze.concept_depth import (
    Concept,
    ProbeCurve,
    concept_depth,
    converging_row,
    forest_probe,
    jump_row,
    nearest,
    probe_layers,
    rounded_weights,
    with_noise,
    yes_or_no,
)
from moestro.analyze.layer_states import layer_states
from moestro.data.tasks import arithmetic, sorting
from moestro.evidence import concept_depth as experiment

TEXTS = [f"text {i}" for i in range(200)]
LABELS = [i % 2 for i in range(200)]
CONCEPT = Concept("odd", TEXTS, LABELS)


def states(strengths: list[float], features: int = 12) -> dict[int, torch.Tensor]:
    """Noise, with the label added to the first feature by so much in each layer."""
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor(LABELS).float()
    found = {}
    for layer, strength in enumerate(strengths):
        x = torch.randn(len(y), features, generator=generator)
        x[:, 0] += strength * y
        found[layer] = x * 10.0**layer  # standardised away
    return found


def test_a_probe_finds_what_is_there_and_nothing_where_there_is_nothing() -> None:
    curve = probe_layers(states([0.0, 3.0, 20.0]), CONCEPT, progress=False)
    assert abs(curve.accuracy[0] - 0.5) < 0.12
    assert curve.accuracy[1] > 0.85
    assert curve.accuracy[2] == curve.f1[2] == curve.auc[2] == 1
    assert curve.auc[1] > curve.accuracy[1]
    assert curve.train_accuracy[0] > 0.55  # of 120 texts a probe of 12 features learns some by heart
    assert bool(((curve.shuffled - 0.5).abs() < 0.15).all())  # shuffled labels cannot be learnt from any layer
    torch.testing.assert_close(curve.correct.double().mean(0), curve.accuracy)
    assert len(curve.test) == 80
    assert (curve.layers, curve.depth, curve.best) == ((0, 1, 2), 3, 2)


def test_f1_is_that_of_class_one() -> None:
    """A probe that always says 0 has F1 0, however many texts are 0."""

    class Never:
        def fit(self, x, y):
            return self

        def predict(self, x):
            return np.zeros(len(x), dtype=int)

        def predict_proba(self, x):
            return np.tile([1.0, 0.0], (len(x), 1))

        def score(self, x, y):
            return float((y == 0).mean())

    labels = [int(i < 60) for i in range(200)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curve = probe_layers({0: torch.zeros(200, 2)}, Concept("rare", TEXTS, labels), probe=lambda _: Never())
    assert curve.accuracy.tolist() == [0.7]
    assert curve.f1.tolist() == [0.0]


def test_a_forest_finds_what_is_not_linear() -> None:
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    labels = (x[:, 0] * x[:, 1] > 0).long().tolist()
    concept = Concept("signs agree", TEXTS, labels)
    linear = probe_layers({0: x}, concept, progress=False)
    forest = probe_layers({0: x}, concept, probe=forest_probe, progress=False)
    assert linear.accuracy[0] < 0.7 < 0.85 < forest.accuracy[0]


def test_train_and_test_have_both_classes_in_proportion_and_no_text_in_common() -> None:
    train, test = CONCEPT.split(seed=3)
    assert not set(train.tolist()) & set(test.tolist())
    assert len(train) + len(test) == 200
    assert sum(LABELS[i] for i in test) == 40
    assert CONCEPT.split(seed=4)[1].tolist() != test.tolist()
    assert CONCEPT.split(seed=3)[1].tolist() == test.tolist()


@pytest.mark.parametrize(
    ("accuracy", "jump", "settled"),
    [
        ([0.5, 0.5, 0.6, 0.9, 0.9, 0.91], 2, 3),  # flat after layer 3
        ([0.9, 0.9, 0.9, 0.9], 4, 0),  # held from the start; there is no jump
        ([0.5, 0.52, 0.54, 0.56], 4, 3),  # rises to the end, a little each time
        ([0.8, 0.5, 0.5, 0.5], 4, 1),  # a fall is a move, and no jump
        ([0.5, 0.55, 0.55], 1, 1),  # exactly 1.1 times
    ],
)
def test_jump_and_converging_point_by_hand(accuracy: list[float], jump: int, settled: int) -> None:
    curve = np.array(accuracy)
    assert jump_row(curve) == jump
    assert converging_row(curve) == settled
    both = np.stack([curve, curve[::-1]])
    assert jump_row(both)[0] == jump
    assert converging_row(both)[0] == settled


def curve_of(accuracy: list[float], texts: int, layers: tuple[int, ...], depth: int) -> ProbeCurve:
    correct = torch.stack([torch.arange(texts) < round(a * texts) for a in accuracy], dim=1)
    a = correct.double().mean(0)
    return ProbeCurve(layers, depth, a, a, a, a, a, correct, torch.arange(texts))


def test_depths_are_fractions_with_intervals_that_narrow_with_the_texts() -> None:
    few, many = (concept_depth(curve_of([0.5, 0.5, 0.9, 0.9], n, (0, 2, 4, 6), 8)) for n in (20, 2000))
    for found in (few, many):
        assert found.jump_point is not None
        assert (found.jump_point.estimate, found.converging_point.estimate) == (4 / 8, 4 / 8)
        assert (found.peak.estimate, found.peak_depth) == (0.9, 4 / 8)
        assert found.peak.low < 0.9 < found.peak.high
    assert many.peak.high - many.peak.low < few.peak.high - few.peak.low
    assert (many.converging_point.low, many.converging_point.high) == (0.5, 0.5)
    assert concept_depth(curve_of([0.9, 0.9], 100, (0, 1), 2)).jump_point is None


def test_noise_stands_right_before_the_text() -> None:
    noisy = with_noise(TEXTS, seed=1)
    assert {n[: -len(t)] for n, t in zip(noisy, TEXTS)} == {"aaa", "bbb"}
    assert with_noise(TEXTS, seed=1) == noisy != with_noise(TEXTS, seed=2)


def test_rounding_is_to_the_nearest_of_few_steps_and_is_undone() -> None:
    weight = torch.tensor([[0.0, 0.34, -0.7], [7.0, 1.4, -0.2]])
    torch.testing.assert_close(nearest(weight, 4), torch.tensor([[0.0, 0.3, -0.7], [7.0, 1.0, 0.0]]))
    small = tiny.make("qwen3_moe")
    view, data = moestro.open(small.model), {"input_ids": tiny.documents(9)[0][None]}
    before, exact = tiny.state_of(small.model), tiny.logits_of(small, data)
    off = {}
    for bits in (16, 8, 4):
        with rounded_weights(view, bits):
            off[bits] = (tiny.logits_of(small, data) - exact).abs().max()
            gate_up = view.layers[0].experts.gate_up_proj
            if bits == 4:
                assert len(gate_up[0, 0].unique()) <= 15
        assert tiny.same_state(small.model, before)
    assert 0 < off[16] < off[4]
    assert 0 < off[8] < off[4]
    with pytest.raises(RuntimeError, match="stop"), rounded_weights(small.model, 4):
        raise RuntimeError("stop")
    assert tiny.same_state(small.model, before)
    with pytest.raises(ValueError, match="bits=9"), rounded_weights(view, 9):
        pass


@pytest.mark.parametrize(
    ("texts", "labels", "says"),
    [
        (TEXTS, [0] * 200, "0 texts with label 1"),
        (TEXTS[:90], LABELS[:90], "45 texts with label 0; a probe needs 50"),
        (TEXTS, [2 * x for x in LABELS], "label 2; a probe's labels are 0 and 1"),
        (TEXTS, [x or -1 for x in LABELS], "label -1"),
        (TEXTS, LABELS[:-1], "200 texts and 199 labels"),
    ],
)
def test_what_cannot_be_probed_is_refused(texts: list[str], labels: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Concept("c", texts, labels)


def test_a_text_in_training_and_test_is_refused() -> None:
    copies = Concept("c", TEXTS[:100] * 2, LABELS)
    with pytest.raises(ValueError, match="texts are in training and test, 'text"):
        probe_layers(states([1.0]), copies, progress=False)


def test_states_of_other_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 0 has states of 200 texts, and c has 198"):
        probe_layers(states([1.0]), Concept("c", TEXTS[:198], LABELS[:198]), progress=False)


def test_answers_are_the_more_probable_of_yes_and_no() -> None:
    """A head that prefers one answer gets the share of that label right."""
    view = moestro.open("quartet")
    concept = Concept("odd", TEXTS[:100], LABELS[:100])
    answers = view.tokenizer(["yes", "no"], add_special_tokens=False)["input_ids"]
    model = view.model
    for favourite, expected in ((answers[0][0], 50), (answers[1][0], 50)):
        hook = model.lm_head.register_forward_hook(
            lambda m, a, out, t=favourite: out.index_fill(-1, torch.tensor([t]), 1e4)
        )
        try:
            found = yes_or_no(model, view.tokenizer, concept, progress=False)
        finally:
            hook.remove()
        assert found.estimate == expected / 100
        assert found.low < 0.5 < found.high
    one_sided = Concept("mostly", TEXTS[:150], [int(i < 100) for i in range(150)])
    hook = model.lm_head.register_forward_hook(lambda m, a, out: out.index_fill(-1, torch.tensor([answers[0][0]]), 1e4))
    try:
        assert yes_or_no(model, view.tokenizer, one_sided, progress=False).estimate == pytest.approx(100 / 150)
    finally:
        hook.remove()
    with pytest.raises(ValueError, match="begin with the same tokens"):
        yes_or_no(model, view.tokenizer, concept, yes=["yes"], no=["yes"])
    with pytest.raises(ValueError, match=r"does not hold \{text\}"):
        yes_or_no(model, view.tokenizer, concept, question="Yes or no?")


def test_a_concept_is_read_off_the_bundled_models_states() -> None:
    """From texts to depths, on a concept that the first layer holds."""
    view = moestro.open("quartet")
    sums, sorts = ([p.text for p in generate(0, 60)] for generate in (arithmetic, sorting))
    concept = Concept(
        "sorting", [*dict.fromkeys(sums), *dict.fromkeys(sorts)], [0] * len({*sums}) + [1] * len({*sorts})
    )
    found = layer_states(view, view.tokenizer, concept.texts, progress=False)
    curve = probe_layers(found, concept, progress=False)
    assert curve.depth == len(curve.layers) == 6
    assert bool((curve.accuracy > 0.9).all())
    assert concept_depth(curve).converging_point.estimate <= 2 / 6


TRUTH = {
    experiment.EQUATION: lambda t: eval(t.split("=")[0]) == int(t.split("=")[1]),
    experiment.ORDER: lambda t: (n := [*map(int, t.split())]) == sorted(n),
    experiment.COIN: lambda t: t.count(" flips ") % 2 == 0,
}


@pytest.mark.parametrize("name", experiment.CONCEPTS)
def test_the_experiments_labels_are_true_and_balanced(name: str) -> None:
    concept = experiment.make_concept(name, 300)
    assert (len({*concept.texts}), sum(concept.labels)) == (300, 150)
    assert experiment.make_concept(name, 300).texts == concept.texts
    if name in TRUTH:
        assert [int(TRUTH[name](t)) for t in concept.texts] == list(concept.labels)
