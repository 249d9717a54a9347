"""moestro fit: what is saved was planned and measured; held-out text chooses nothing; nothing half is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import moestro
from moestro.cli import app
from moestro.fitting.result import FitReport

QUICK = {"calibration_tokens": 1500, "heldout_tokens": 400, "max_length": 128, "progress": False}


def records(*parts: str, split: str) -> list[dict[str, str]]:
    return [{"text": text, "domain": "words", "split": split} for text in parts]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> moestro.fitting.pipeline.Fitted:
    out = tmp_path_factory.mktemp("fit") / "small"
    return moestro.fit("quartet", ["code", "ui-de"], experts="25%", rest=["embedded:docs"], out=out, **QUICK)


def test_the_saved_model_is_the_planned_and_measured_one(fitted):
    report = FitReport.model_validate_json((fitted.path / "report.json").read_text())
    assert [layer.kept for layer in report.layers] == list(fitted.plan.keep.values())
    assert all(len(layer.kept) == 8 for layer in report.layers)
    assert report.after.bytes == fitted.plan.bytes_after
    assert 0 < (fitted.path / "model.safetensors").stat().st_size - report.after.bytes < 100_000  # the header
    assert {d.domain: d.task for d in report.losses} == {"code": True, "ui-de": True, "docs": False}
    assert all(d.after > d.before for d in report.losses)
    assert (fitted.path / "report.html").stat().st_size > 10_000
    plain = transformers.AutoModelForCausalLM.from_pretrained(fitted.path)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, fitted.view.model(ids).logits)


def test_an_open_model_is_cut_in_place_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    view = moestro.open("quartet")
    result = moestro.fit(view, "arithmetic", memory="70%", saliency="reap", rest=(), **QUICK)
    assert result.view is view
    assert view.num_bytes <= 0.7 * result.report.before.bytes
    assert result.report.after.load_seconds is None or result.path is None
    assert list(tmp_path.iterdir()) == []


def test_held_out_text_has_no_say_in_the_choice():
    calibration = records("the quick brown fox jumps over the lazy dog " * 20, split="calibration")
    plans = [
        moestro.fit("quartet", [calibration + records(text * 30, split="heldout")], rest=(), **QUICK).plan
        for text in ("0 1 2 3 4 5 6 ", "Die Sitzung ist abgelaufen. ")
    ]
    assert plans[0].keep == plans[1].keep


def test_thin_calibration_is_told():
    few = records("only these few words", split="calibration") + records("and some others", split="heldout")
    report = moestro.fit("quartet", [few], rest=(), **QUICK).report
    assert report.coverage.unseen > 0
    assert any("calibration tokens" in warning for warning in report.warnings)
    assert sum(score is None for layer in report.layers for score in layer.scores) == report.coverage.unseen


def test_the_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["fit", "--dry-run", "--calibration-tokens", "1000", "--memory", "60%"])
    assert result.exit_code == 0, result.exception
    assert "checkpoint of at most 60%" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["solo"], "dense model"),
        (["--memory", "50"], "not understood"),
        (["--memory", "1MB"], "too small: the shared parts take"),
        (["--memory", "50%", "--experts", "50%"], "one of the two"),
        (["--experts", "5%"], "at least 12.5%"),
        (["--for", "nosuch"], "embedded domain"),
        (["--saliency", "foo"], "there are random"),
        (["nosuch/checkpoint"], ""),
    ],
)
def test_bad_requests_end_before_any_work(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["fit", *arguments])
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError | OSError)
    assert words in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept(fitted):
    before = (fitted.path / "report.json").read_bytes()
    with pytest.raises(FileExistsError, match="overwrite"):
        moestro.fit("quartet", "code", out=fitted.path, **QUICK)
    assert (fitted.path / "report.json").read_bytes() == before


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_half_checkpoint(sign, tmp_path):
    code = "import sys; from moestro.cli import main; print('ready', flush=True); main()"
    command = [sys.executable, "-c", code, "fit", "--out", "target", "--rest", "embedded:docs"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 120
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sign)
    assert process.wait(timeout=120) != 0
    assert not (tmp_path / "target").exists()
    if sign == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []


def test_the_record_of_the_cut_names_the_original_experts(fitted):
    notes = json.loads(Path(fitted.path / "moestro.json").read_text())
    assert notes["original_experts"] == {str(i): ids for i, ids in fitted.plan.keep.items()}
