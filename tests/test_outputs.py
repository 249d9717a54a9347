"""What commands write and where: nothing of the user's is replaced, results and complaints come apart."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import moestro
from moestro.bundled import bundled_path
from moestro.cli import app
from moestro.directories import lock, write_manifest
from moestro.evidence.league_command import command
from moestro.looking.pipeline import look
from moestro.recipe import Recipe
from moestro.steer.steering import Steering
from moestro.train.run_folder import check_folder

MAIN = "import sys; sys.argv[0] = 'moestro'; from moestro.cli import main; main()"
QUICK = ["--calibration-tokens", "300", "--heldout-tokens", "100"]


def moestro_command(*arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", MAIN, *arguments], cwd=cwd, env=environment, **pipes)


def refusal(*arguments: str) -> str:
    ended = CliRunner().invoke(app, list(arguments))
    assert ended.exit_code in (1, 2), ended.output
    return str(ended.exception) if ended.exit_code == 1 else ended.output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "m"
    shutil.copytree(str(bundled_path("quartet")), place)
    return place


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("texts")
    for name in ("a", "b"):
        (place / f"{name}.txt").write_text("\n".join(f"{name} sentence number {i} of many" for i in range(20)))
    return place


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", ""],
        ["fit", "--for", ""],
        ["fit", "--out", ""],
        ["fit", "--stream", "--work", " "],
        ["fit", "--stats", ""],
        ["apply", "recipe.json", "quartet", "--out", ""],
        ["apply", "recipe.json", "", "--out", "x"],
        ["look", ""],
        ["look", "--data", ""],
        ["look", "--out", ""],
        ["generate", "", "prompt"],
        ["generate", "quartet", "prompt", "--steer", ""],
        ["steer", "set", "quartet", "--off", "1:1", "--out", ""],
        ["steer", "show", ""],
        ["studio", "", "--no-browser"],
        ["train", ""],
        ["league", "--out", ""],
        ["reproduce", "easy-ep", "--model", ""],
        ["gguf", "", "model.gguf"],
        ["gguf", "quartet", ""],
    ],
    ids=" ".join,
)
def test_empty_strings_are_no_paths_on_the_command_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 2
    assert "an empty string names no file" in " ".join(ended.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("empty", ["", Path("")], ids=["text", "path"])
def test_empty_strings_are_no_paths_in_python(
    empty: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").symlink_to(model)
    monkeypatch.chdir(tmp_path / "here")  # the current directory is a checkpoint: it must not be taken for the model
    view = moestro.open("quartet")
    before = sorted(os.listdir())
    for call in (
        lambda: moestro.open(empty),
        lambda: moestro.open(empty, stream=True),
        lambda: moestro.fit(empty),
        lambda: moestro.fit(view, empty),
        lambda: moestro.fit(view, out=empty),
        lambda: moestro.fit(view, stats=empty),
        lambda: moestro.fit("quartet", stream=True, out=tmp_path / "out", work=empty),
        lambda: look(empty),
        lambda: look(view, [empty]),
        lambda: look(view, out=empty),
        lambda: view.save(empty),
        lambda: Steering.of(view).save(empty),
        lambda: Steering.load(empty),
        lambda: check_folder(Path(empty), {}),
    ):
        with pytest.raises(ValueError, match=r"names no file or directory|may be an empty string"):
            call()
    with pytest.raises(ValueError, match="names no file or directory"):
        Recipe.load("")
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "place", ["{model}", "{model}/", "{model}/cut", "{model}/..", "link", "{relative}", "{texts}/o"]
)
def test_a_fit_or_look_into_what_it_reads_is_refused(
    place: str, stream: bool, model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(model)
    out = place.format(model=model, relative=os.path.relpath(model), texts=texts)
    before = {file: file.stat().st_mtime_ns for file in model.rglob("*")}
    with pytest.raises(ValueError, match="that model or data are read from"):
        moestro.fit(str(model), [str(texts)], out=out, stream=stream, overwrite=True)
    with pytest.raises(ValueError, match="that model or data are read from"):
        look(str(model), [str(texts)], out=out, stream=stream, overwrite=True)
    assert {file: file.stat().st_mtime_ns for file in model.rglob("*")} == before


def test_a_recipe_is_not_applied_over_what_carries_it(model: Path, tmp_path: Path) -> None:
    view = moestro.open(str(model))
    view.set_top_k(2)
    cut = view.save(tmp_path / "cut")
    for out in (cut, cut / "x", tmp_path, model, model / "x"):
        told = refusal("apply", str(cut), str(model), "--out", str(out), "--overwrite")
        assert "that model or data are read from" in told
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    told = refusal("apply", str(cut), str(model), "--out", str(tmp_path / "mine"), "--overwrite")
    assert "holds something else than a checkpoint" in told


def test_a_steering_file_replaces_steering_files_alone(model: Path, texts: Path, tmp_path: Path) -> None:
    learn = ["steer", "learn", str(model), "--toward", str(texts / "a.txt"), "--against", str(texts / "b.txt")]
    notes = tmp_path / "notes.json"
    notes.write_text("{}")
    for out, words in (
        (model / "config.json", "that model or data are read from"),
        (model / "new.json", "that model or data are read from"),
        (texts / "a.txt", "that model or data are read from"),
        (notes, "it is no steering file"),
        (tmp_path, "is a directory"),
    ):
        assert words in refusal(*learn, "--out", str(out), "--overwrite")
    assert notes.read_text() == "{}"
    out = tmp_path / "steering.json"
    for _ in range(2):
        done = CliRunner().invoke(app, [*learn, "--top", "2", "--out", str(out), "--overwrite"])
        assert done.exit_code == 0, done.output
    written = out.read_text()
    assert "a.txt (20 texts)" in written
    assert all(word not in written for word in (str(texts), str(model), "sentence number"))


def test_a_league_replaces_no_page_of_other_making_and_tells_no_directory(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    assert "notes.md exists" in refusal("league", "--quick", "--steps", "1", "--out", str(tmp_path / "notes.parquet"))
    assert (tmp_path / "notes.md").read_text() == "mine"
    assert str(tmp_path) not in command(False, None, [tmp_path / "mine.py"], tmp_path / "t.parquet")
    with lock(tmp_path / "t.parquet"):
        told = refusal("league", "--quick", "--steps", "1", "--only", "dense", "--out", str(tmp_path / "t.parquet"))
    assert "is being written by process" in told


def test_results_and_complaints_come_apart(tmp_path: Path) -> None:
    right = moestro_command("steer", "set", "quartet", "--off", "1:1", "--out", "s.json", cwd=tmp_path)
    out, err = right.communicate(timeout=120)
    assert right.returncode == 0
    assert b"written: s.json" in out
    assert b"written" not in err
    wrong = moestro_command("steer", "show", "s.json", "--model", "missing-model-xyz", cwd=tmp_path)
    out, err = wrong.communicate(timeout=120)
    assert wrong.returncode == 1
    assert b"for Qwen3MoeForCausalLM" in out  # what was told before the fault
    assert b"error:" in err
    assert b"error" not in out


def test_two_fits_to_one_place_exclude_each_other(model: Path, tmp_path: Path) -> None:
    with lock(tmp_path / "out"), pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
        moestro.fit(str(model), out=tmp_path / "out")
    with lock(tmp_path / "work"), pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
        moestro.fit(str(model), out=tmp_path / "out", work=tmp_path / "work", stream=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_fit_that_is_ended_leaves_the_old_result_whole(how: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["fit", "quartet", "--out", "out", "--overwrite", *QUICK]
    out.mkdir()
    (out / "config.json").write_text("old")
    write_manifest(out)
    process = moestro_command(*arguments, cwd=tmp_path)
    while not [file for file in tmp_path.glob(".out-*/*/*") if file.is_file()]:  # it is saving
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == (143 if how == signal.SIGTERM else -9)
    assert (out / "config.json").read_text() == "old"
    if how == signal.SIGTERM:
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    again = moestro_command(*arguments, cwd=tmp_path)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert moestro.open(str(out)).layers[0].num_experts == 16
