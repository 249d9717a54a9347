"""The distillation experiment: excerpts are what they say, and every student is measured on the same ones."""

from typing import Any

import pytest
import torch

from moestro.evidence import comet_distillation as experiment
from moestro.evidence.base import Rows


def test_excerpts_are_padded_stretches_of_their_domains() -> None:
    data = experiment.excerpts("heldout", 20)
    assert torch.bincount(data.domain).tolist() == [20] * len(experiment.DOMAINS)
    lengths = data.mask.sum(dim=1)
    assert (int(lengths.min()), int(lengths.max())) == experiment.LENGTHS
    assert (data.mask[:, :-1] >= data.mask[:, 1:]).all()
    assert ((data.ids != 0) == data.mask.bool()).all()
    assert len(data.ids[:, 0].unique()) == 1
    text = experiment.tokenizer().decode(data.ids[-1][data.mask[-1].bool()].tolist(), skip_special_tokens=True)
    from moestro.data import embedded

    assert any(text.strip() in document.text for document in embedded(["ui-uk"], "heldout"))


def test_no_excerpt_is_trained_on_and_measured_on() -> None:
    train, heldout = ({tuple(row) for row in experiment.excerpts(s).ids.tolist()} for s in ("calibration", "heldout"))
    assert len(train & heldout) < 0.01 * len(heldout)  # formulas of user interfaces repeat


def test_batches_of_a_seed_are_the_same_and_a_pass_has_every_excerpt_once() -> None:
    data = experiment.excerpts("heldout", 6)
    per_pass = -(-len(data.ids) // experiment.BATCH)
    first, again = ([next(b) for _ in range(per_pass)] for b in (experiment.batches(data, 3),) * 2)
    rows = torch.cat([batch["input_ids"] for batch in first])
    assert sorted(rows.tolist()) == sorted(data.ids.tolist())
    assert not torch.equal(rows, torch.cat([batch["input_ids"] for batch in again])), "a new pass, a new order"
    same = next(experiment.batches(data, 3))
    assert all(torch.equal(same[name], first[0][name]) for name in same)


def test_every_student_is_measured_and_the_claims_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "HELDOUT", 6)
    small: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2}
    monkeypatch.setattr(experiment, "BERT", experiment.BERT | small)
    rows, done = Rows(), []
    experiment.measure_students(rows, 0, 4, 4, on_done=lambda: done.append(1))
    assert len(done) == experiment.TRAININGS
    trees = {experiment.COMET, experiment.SEARCHED, experiment.PREDICTIONS_ONLY}
    settings = {(r.setting["model"], r.setting["nodes"]) for r in rows if r.metric == experiment.ACCURACY}
    assert {m for m, nodes in settings if nodes == experiment.ROUNDED} == trees
    assert len({m for m, _ in settings}) == experiment.TRAININGS
    rounded = {"model": experiment.COMET, "nodes": experiment.ROUNDED}
    assert rows.values(experiment.SINGLE, rounded) == [1.0]
    hashed = {"model": experiment.HASH, "nodes": experiment.AS_TRAINED}
    assert rows.values(experiment.USED_EXPERTS, hashed) == [4.0]
    gain = rows.values(experiment.GAIN, {"model": experiment.COMET, "less": experiment.HASH})
    by_hand = [rows.values(experiment.ACCURACY, s)[0] for s in (rounded, hashed)]
    assert gain == [pytest.approx(by_hand[0] - by_hand[1])]
    assert len({claim.name for claim in experiment.claims(rows)}) == 8
