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
from safetensors.torch import load_file
from typer.testing import CliRunner

import moestro
from families import tiny
from moestro.cli import app
from moestro.compress.prune.easy_ep import EasyEPStats
from moestro.fitting import memory
from moestro.fitting.evaluate import HeldoutLoss
from moestro.fitting.result import FitReport
from moestro.recipe import Recipe
from moestro.view.stream import StreamView

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
    run = {"cwd": tmp_path, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    process = subprocess.Popen(command, **run, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 120
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sign)
    _, told = process.communicate(timeout=120)
    assert not (tmp_path / "target").exists()
    if sign == signal.SIGINT:
        assert told.endswith(b"stopped; nothing half-written is left behind\n")
        assert process.returncode == 130
        assert list(tmp_path.iterdir()) == []


def test_usage_errors_and_help_are_typers_own():
    code = "from moestro.cli import main; main()"
    for arguments, status, words in ((["--memry", "3"], 2, "No such option: --memry"), (["--help"], 0, "--memory")):
        command = [sys.executable, "-c", code, "fit", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
        assert done.returncode == status
        assert words in done.stdout + done.stderr


def test_the_record_of_the_cut_names_the_original_experts(fitted):
    notes = json.loads(Path(fitted.path / "moestro.json").read_text())
    assert notes["original_experts"] == {str(i): ids for i, ids in fitted.plan.keep.items()}


# Refused in time, and statistics that serve again


def observed_passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    passes: list[str] = []
    observe = moestro.ExpertView.observe

    def counted(self, *args, **options):
        passes.append(options.get("description"))
        return observe(self, *args, **options)

    monkeypatch.setattr(moestro.ExpertView, "observe", counted)
    return passes


WORDS = [["zq " * 40] * 6]


@pytest.mark.parametrize("family", ["deepseek_v4", "ernie4_5_vl_moe", "generation config", "tokenizer"])
def test_what_cannot_be_cut_or_saved_is_refused_before_the_first_pass(family, tmp_path, monkeypatch):
    tokenizer = moestro.open("quartet").tokenizer
    size = len(tokenizer) + (-8 if family == "tokenizer" else 8)
    model = tiny.build(family if "_" in family else "qwen3_moe", vocab_size=size, num_hidden_layers=3).model
    if family == "generation config":
        model.generation_config.temperature = 0.3
    passes = observed_passes(monkeypatch)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError):
        moestro.fit(model, WORDS, tokenizer=tokenizer, out=tmp_path / "out", rest=(), **QUICK)
    assert passes == []
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_statistics_serve_another_budget_and_saliency(tmp_path, monkeypatch):
    arguments = {"data": ["code", "ui-de"], "rest": (), "stats": tmp_path / "stats", **QUICK}
    fresh = {**arguments, "stats": None}
    first = moestro.fit("quartet", experts="50%", **arguments)
    assert first.plan.observed
    assert {f.name for f in (tmp_path / "stats").iterdir()} == {"statistics.json", "statistics.safetensors"}
    passes = observed_passes(monkeypatch)
    for saliency, experts in (("easy-ep", "25%"), ("reap", "50%"), ("frequency", "25%")):
        served = moestro.fit("quartet", experts=experts, saliency=saliency, **arguments)
        assert not served.plan.observed
        assert "calibration" not in passes
        again = moestro.fit("quartet", experts=experts, saliency=saliency, **fresh)
        assert served.plan.keep == again.plan.keep
        assert served.report.layers == again.report.layers
        assert served.report.coverage == again.report.coverage
        passes.clear()


def test_statistics_that_lack_what_a_saliency_needs_are_completed(tmp_path, monkeypatch):
    arguments = {"data": "code", "rest": (), "stats": tmp_path, **QUICK}
    moestro.fit("quartet", saliency="reap", **arguments)
    assert moestro.fit("quartet", saliency="easy-ep", **arguments).plan.observed
    assert not moestro.fit("quartet", saliency="easy-ep", **arguments).plan.observed
    assert not moestro.fit("quartet", saliency="gating-score", **arguments).plan.observed


def test_statistics_of_another_model_or_other_data_are_refused(tmp_path, monkeypatch):
    arguments = {"data": "code", "rest": (), "stats": tmp_path / "stats", **QUICK}
    moestro.fit("quartet", **arguments)
    view = moestro.open("quartet")
    next(view.layers[0].experts.parameters()).data.mul_(1.01)
    cut = moestro.open("quartet")
    cut.keep_experts({layer.index: range(16) for layer in cut.layers})
    passes = observed_passes(monkeypatch)
    for model, change, words in (
        (view, {}, "another model"),
        (cut, {}, "before or after other cuts"),
        ("quartet", {"calibration_tokens": 1000}, "other data"),
        ("quartet", {"data": "ui-de"}, "other data"),
        ("quartet", {"seed": 1}, "other data"),
    ):
        with pytest.raises(ValueError, match=words):
            moestro.fit(model, **{**arguments, **change})
    (tmp_path / "stats" / "statistics.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        moestro.fit("quartet", **arguments)
    assert passes == []


def test_a_saved_fit_carries_its_recipe_and_statistics(fitted, monkeypatch):
    recipe = Recipe.load(fitted.path)
    assert recipe.operations == fitted.plan.recipe.operations
    assert (fitted.path / recipe.statistics).is_file()
    assert "25% of the experts" in recipe.note
    assert moestro.open(fitted.path).original_ids == fitted.plan.keep
    again = moestro.fit("quartet", ["code", "ui-de"], experts="50%", rest=(), stats=fitted.path, **QUICK)
    assert not again.plan.observed


def test_the_command_says_that_statistics_served(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--stats", "stats", "--calibration-tokens", "1000", "--dry-run"]
    for more, words in (([], "observed 1,"), (["--experts", "25%"], "saved statistics of 1,")):
        output = CliRunner().invoke(app, [*command, *more]).output
        assert words in " ".join(output.split())
    assert [f.name for f in tmp_path.iterdir()] == ["stats"]


# Streamed


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A small fp32 model whose last layer is dense, with the bundled model's tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = moestro.open("quartet").tokenizer
    small = tiny.build("qwen3_moe", vocab_size=len(tokenizer), max_position_embeddings=128, mlp_only_layers=[0, 3])
    small.model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


TASK = {"data": ["code", "ui-de"], "rest": ["embedded:docs"], "experts": "50%", **QUICK}


@pytest.fixture(scope="module")
def in_memory(tiny_checkpoint, tmp_path_factory) -> moestro.fitting.pipeline.Fitted:
    return moestro.fit(tiny_checkpoint, out=tmp_path_factory.mktemp("fit") / "whole", **TASK)


def assert_same_fit(streamed: moestro.fitting.pipeline.Fitted, whole: moestro.fitting.pipeline.Fitted) -> None:
    assert streamed.plan.keep == whole.plan.keep
    assert streamed.report.layers == whole.report.layers
    assert streamed.report.losses == whole.report.losses
    assert [c.bytes for c in (streamed.report.before, streamed.report.after)] == [
        c.bytes for c in (whole.report.before, whole.report.after)
    ]
    ours, theirs = (load_file(fit.path / "model.safetensors") for fit in (streamed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_statistics_from_memory_serve_a_stream_of_the_same_files(tiny_checkpoint, tmp_path):
    arguments = {"stats": tmp_path, **TASK}
    moestro.fit(tiny_checkpoint, **arguments)
    assert not moestro.fit(moestro.open(tiny_checkpoint, stream=True), **arguments).plan.observed


def test_a_streamed_fit_is_the_fit_in_memory(tiny_checkpoint, in_memory, tmp_path):
    out = tmp_path / "streamed"
    streamed = moestro.fit(tiny_checkpoint, out=out, stream=True, **TASK)
    assert_same_fit(streamed, in_memory)
    assert list(tmp_path.iterdir()) == [out]
    assert {f.name for f in out.iterdir()} == {f.name for f in in_memory.path.iterdir()}
    report = FitReport.model_validate_json((out / "report.json").read_text())
    assert report.streamed
    assert report.samples == []
    assert report.after.tokens_per_second is report.after.load_seconds is None
    assert streamed.view.streamed
    assert streamed.view.path == out
    assert streamed.view.num_bytes == report.after.bytes


def test_an_open_streamed_view_is_planned_and_nothing_is_written(tiny_checkpoint, in_memory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    view = moestro.open(tiny_checkpoint, stream=True)
    result = moestro.fit(view, **TASK)
    assert result.view is view
    assert result.report.losses == in_memory.report.losses
    assert list(tmp_path.iterdir()) == []


def refused(*_: object, **__: object) -> None:
    raise AssertionError("this was done already")


@pytest.mark.parametrize("stage", ["before", "after"])
def test_a_streamed_fit_goes_on_where_it_stopped(stage, tiny_checkpoint, in_memory, tmp_path, monkeypatch):
    passes, update_logits = iter(["before", "after"]), HeldoutLoss.update_logits

    def stops(self, *args) -> None:  # the held-out texts make one batch
        if next(passes) == stage:
            raise KeyboardInterrupt
        update_logits(self, *args)

    arguments = dict(out=tmp_path / "out", stream=True, **TASK)
    monkeypatch.setattr(HeldoutLoss, "update_logits", stops)
    with pytest.raises(KeyboardInterrupt):
        moestro.fit(tiny_checkpoint, **arguments)
    assert list(tmp_path.iterdir()) == [tmp_path / "out.work"]
    monkeypatch.setattr(HeldoutLoss, "update_logits", update_logits)
    monkeypatch.setattr(EasyEPStats, "update", refused)
    if stage == "after":
        monkeypatch.setattr(StreamView, "save", refused)
    assert_same_fit(moestro.fit(tiny_checkpoint, **arguments), in_memory)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_named_work_directory_stays_and_serves_another_budget(tiny_checkpoint, in_memory, tmp_path, monkeypatch):
    arguments = dict(stream=True, work=tmp_path / "work", **TASK)
    moestro.fit(tiny_checkpoint, out=tmp_path / "quarter", **{**arguments, "experts": "25%"})
    monkeypatch.setattr(EasyEPStats, "update", refused)
    assert_same_fit(moestro.fit(tiny_checkpoint, out=tmp_path / "half", **arguments), in_memory)
    assert_same_fit(moestro.fit(tiny_checkpoint, out=tmp_path / "again", **arguments), in_memory)
    assert moestro.fit(tiny_checkpoint, **arguments).report.losses == in_memory.report.losses
    with pytest.raises(ValueError, match="work/before holds an observation with other data;"):
        moestro.fit(tiny_checkpoint, out=tmp_path / "more", **{**arguments, "heldout_tokens": 500})
    assert {f.name for f in tmp_path.iterdir()} == {"work", "quarter", "half", "again"}


def test_a_killed_streamed_run_is_finished_by_the_same_command(tiny_checkpoint, tmp_path):
    code = "import sys; from moestro.cli import main; main()"
    command = [sys.executable, "-c", code, "fit", str(tiny_checkpoint), "--stream", "--out", "target"]
    command += ["--rest", "embedded:docs", "--calibration-tokens", "3000", "--heldout-tokens", "2000"]
    run = {"cwd": tmp_path, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    process = subprocess.Popen(command, **run, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "target.work" / "before").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert [f.name for f in tmp_path.iterdir() if not f.name.startswith(".")] == ["target.work"]
    done = subprocess.run(command, **run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "streamed from disk" in done.stdout
    assert [f.name for f in tmp_path.iterdir()] == ["target"]
    assert "streamed layer by layer" in (tmp_path / "target" / "report.html").read_text()


def test_more_than_memory_holds_is_refused_before_it_is_loaded(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**6)
    monkeypatch.setattr(moestro.view.open, "load", None)
    for options in ({"out": tmp_path / "out"}, {}):
        with pytest.raises(ValueError, match=r"tiny holds 0\.0\d GB of weights, and 0\.00 GB .* pass --stream"):
            moestro.fit(tiny_checkpoint, **options, **TASK)
    result = CliRunner().invoke(app, ["fit", "quartet", "--dry-run"])
    assert "pass --stream" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_available_memory_minds_what_a_container_may_take(tmp_path, monkeypatch):
    free = memory.available_bytes()
    assert free is None or free > 10**6
    (tmp_path / "memory.max").write_text("123456\n")
    monkeypatch.setattr(memory, "LIMIT", tmp_path / "memory.max")
    assert memory.available_bytes() == (None if free is None else 123456)


def test_streamed_requests_that_cannot_be(tiny_checkpoint, in_memory, tmp_path):
    with pytest.raises(ValueError, match="pass --stream"):
        moestro.fit(tiny_checkpoint, work=tmp_path / "work", **TASK)
    with pytest.raises(ValueError, match="lie in each other"):
        moestro.fit(tiny_checkpoint, out=tmp_path / "out", stream=True, work=tmp_path / "out" / "work", **TASK)
    with pytest.raises(ValueError, match="in memory already"):
        moestro.fit(moestro.open(tiny_checkpoint), stream=True, **TASK)
    with pytest.raises(FileExistsError, match="overwrite"):
        moestro.fit(tiny_checkpoint, out=in_memory.path, stream=True, **TASK)
    with pytest.raises(ValueError, match="holds the directory"):
        moestro.fit(tiny_checkpoint, out=tiny_checkpoint.parent, stream=True, overwrite=True, **TASK)
    with pytest.raises(FileNotFoundError, match="there is none at"):
        moestro.fit("nosuch", out=tmp_path / "out", stream=True, **TASK)
    assert list(tmp_path.iterdir()) == []
