"""Output directories: what is not ours stays, one writer at a time, and a kill leaves the old or the new result."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moestro.directories import check_apart, complete_directory, lock

WRITER = """
import sys, time
from pathlib import Path
from moestro.directories import complete_directory
with complete_directory(sys.argv[1], overwrite=True) as half:
    (half / "config.json").write_text("new")
    print("ready", flush=True)
    time.sleep(60)
"""


def write(path: Path, text: str, *, overwrite: bool = True) -> None:
    with complete_directory(path, overwrite=overwrite) as half:
        (half / "config.json").write_text(text)
        (half / "sub").mkdir()
        (half / "sub" / "README.md").write_text("card")


def killed_while_writing(out: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()


@pytest.mark.parametrize("name", [".git/HEAD", "optimizer.pt", "sub/notes", "empty/"])
def test_overwriting_never_loses_what_is_not_ours(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).mkdir() if name.endswith("/") else (out / name).write_text("mine")
    with pytest.raises(FileExistsError, match=name.rstrip("/")):
        write(out, "new")
    assert (out / "config.json").read_text() == "old"
    assert (out / name).exists()


def test_a_file_of_ours_that_was_edited_is_the_users(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "sub" / "README.md").write_text("edited")
    with pytest.raises(FileExistsError, match=r"sub/README.md \(or it was changed"):
        write(tmp_path / "out", "new")


def test_an_older_output_without_a_manifest_is_replaced_unless_it_holds_more(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"README\.md"):
        write(out, "new")
    (out / "README.md").unlink()
    write(out, "new")
    assert (out / "config.json").read_text() == "new"
    write(out, "newer")
    assert (out / "config.json").read_text() == "newer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_the_source_is_seen_through_links_and_spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    for out in (
        model,
        model / "fit",
        tmp_path / "models",
        Path("models/../models/m"),
        Path("link"),
        Path("link/new/x"),
    ):
        with pytest.raises(ValueError, match="that model or data are read from"):
            check_apart(out, [model])
        with pytest.raises(ValueError, match="that model or data are read from"):
            check_apart(out, ["link"])
    check_apart(tmp_path / "models" / "m-fit", [model])


def test_an_empty_string_is_no_directory() -> None:
    with pytest.raises(ValueError, match="names no file or directory"), complete_directory("", overwrite=True):
        pass


def test_two_writers_exclude_each_other_and_a_kill_releases(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    with pytest.raises(BlockingIOError, match=f"process {process.pid}"):
        write(out, "mine")
    process.kill()
    process.wait()
    assert (out / "config.json").read_text() == "old"
    write(out, "mine")
    assert (out / "config.json").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]  # the killed run's leftovers are gone


def test_threads_exclude_each_other(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def second() -> None:
        try:
            write(tmp_path / "out", "second")
        except BlockingIOError as error:
            caught.append(error)

    with lock(tmp_path / "out"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(caught) == 1
    write(tmp_path / "out", "after")


def test_a_kill_between_the_two_moves_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    killed_while_writing(out)
    (work,) = tmp_path.glob(".out-*")
    out.rename(work / "out")  # where the process had come to when it was killed
    with pytest.raises(RuntimeError), complete_directory(out, overwrite=True):
        raise RuntimeError
    assert (out / "config.json").read_text() == "old"
    assert json.loads((out / "moestro-files.json").read_text())["files"].keys() == {"config.json", "sub/README.md"}


def test_what_a_user_named_alike_is_not_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / ".out-deadbeef").mkdir()
    (tmp_path / ".out-deadbeef" / "mine").write_text("mine")
    write(tmp_path / "out", "new")
    assert (tmp_path / ".out-deadbeef" / "mine").read_text() == "mine"


MAIN = "import sys; sys.argv[0] = 'moestro'; from moestro.cli import main; main()"


@pytest.mark.slow
def test_sigterm_stops_a_fit_like_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('ready', flush=True); " + MAIN, "fit", "quartet", "--out", "fitted"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    while not list(tmp_path.glob(".fitted-*")):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert b"nothing half-written is left behind" in process.stderr.read()
    assert list(tmp_path.iterdir()) == []
