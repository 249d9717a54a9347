"""The recipe of quartet and solo: its plan, and a training that can be stopped and resumed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from moestro.train.export import trained_model
from moestro.train.measure import mutual_information
from moestro.train.packing import ROW, Rows
from moestro.train.pretrain import BATCH_ROWS, new_model, plan_of, start_training
from moestro.train.trainer import Trainer

MODEL = dict(vocab_size=64, pad=0, bos=1, eos=2, seed=0)


def test_the_rate_warms_up_holds_and_decays_to_zero() -> None:
    plan = plan_of("quartet", tokens=1000 * BATCH_ROWS * ROW)
    rates = [plan.rate(step) for step in range(plan.steps + 1)]
    assert plan.steps == 1000
    assert rates[0] < rates[100] < rates[plan.warmup_steps] == plan.peak_rate == rates[500]
    assert rates[-1] == 0.0
    assert rates[900] < rates[700]
    assert plan_of("solo").router_losses is None


def some_rows(count: int) -> Rows:
    rng = np.random.default_rng(0)
    tokens = rng.integers(6, 40, (count, ROW)).astype(np.uint16)
    return Rows(tokens, np.arange(count) % 2, ["a", "b"])


def run_of(kind: str, folder: Path) -> Trainer:
    small = plan_of(kind, batch_rows=2, steps=6, warmup_steps=2, log_every=3, save_every=3, evaluate_every=6)
    return start_training(kind, new_model(kind, **MODEL), some_rows(12), some_rows(4), small, folder, progress=False)


@pytest.mark.parametrize("kind", ["quartet", "solo"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    straight = run_of(kind, tmp_path / "straight")
    straight_losses = [straight.train_step()["loss"] for _ in range(4)]
    stopped = run_of(kind, tmp_path / "stopped")
    losses = [stopped.train_step()["loss"] for _ in range(2)]
    stopped.save()
    resumed = run_of(kind, tmp_path / "stopped")
    assert resumed.step == 2
    losses += [resumed.train_step()["loss"] for _ in range(2)]
    assert losses == straight_losses
    assert all(torch.equal(a, b) for a, b in zip(straight.weights, resumed.weights))


def test_rows_are_taken_as_they_lie(tmp_path: Path) -> None:
    run = run_of("solo", tmp_path)
    assert [list(part) for part in run._micro_batches()] == [[0, 1]]
    run.train_step()
    assert [list(part) for part in run._micro_batches()] == [[2, 3]]


def test_training_lowers_the_loss_and_its_checkpoint_is_exported(tmp_path: Path) -> None:
    training = run_of("quartet", tmp_path / "quartet")
    before = training.evaluate(some_rows(4), 2)
    training.run()
    after = training.evaluate(some_rows(4), 2)
    assert set(after) == {"a", "b"}
    assert all(after[domain] < before[domain] for domain in after)

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, "w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
    model, run = trained_model("quartet", tmp_path, tokenizer)
    assert run["step"] == run["plan"]["steps"] == 6
    for mine, master in zip(model.parameters(), training.weights, strict=True):
        assert torch.equal(mine, master.bfloat16())


def test_mutual_information_of_known_tables() -> None:
    assert mutual_information(np.full((4, 8), 10.0)) == pytest.approx(0.0)
    assert mutual_information(np.eye(4) * 7) == pytest.approx(2.0)
    assert mutual_information(np.array([[1.0, 0.0], [100.0, 0.0]])) == pytest.approx(0.0)
