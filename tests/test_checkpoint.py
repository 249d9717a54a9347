"""Checkpoints: what is saved is plain, complete and the same model; what goes wrong leaves nothing behind."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.testing import assert_close
from transformers import GenerationConfig, PreTrainedTokenizerFast

import moestro
import tiny
from moestro.directories import complete_directory
from moestro.formats.tensors import Writer
from tiny import FP32, LEARNED, documents, logits_of, make, padded

INPUTS = padded(documents(7, 3, 9), "right")
HALF = [0, 3, 5, 6]


def half(family: str, **more: Any) -> moestro.ExpertView:
    view = moestro.open(make(family, **more).model)
    view.keep_experts({layer.index: HALF for layer in view.layers})
    return view


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "expert": 2, "router": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.chat_template = "{{ messages }}"
    return fast


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved half of qwen3_moe, with everything a checkpoint may hold."""
    view = half("qwen3_moe")
    view.tokenizer = words()
    view.model.generation_config = GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=[2, 7])
    return view.save(tmp_path_factory.mktemp("saved") / "half")


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copied"))


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- saving ----------------------------------------------------------------------------------------------------------


def test_plain_transformers_reloads_the_same_model(tmp_path: Path) -> None:
    """In a process that never imports moestro."""
    arguments = []
    for family in LEARNED:
        view = half(family)
        view.save(tmp_path / family)
        torch.save(INPUTS, tmp_path / f"{family}-inputs.pt")
        torch.save(logits_of(view.model, INPUTS), tmp_path / f"{family}-before.pt")
        arguments += [tmp_path / family, type(view.model).__name__]
        arguments += [tmp_path / f"{family}-inputs.pt", tmp_path / f"{family}-after.pt"]
    script = Path(__file__).parent / "reload_plain.py"
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: the order of sums, so the last bit, depends on it
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=one_thread)
    assert done.returncode == 0, done.stderr[-3000:]
    for family in LEARNED:
        before, after = (torch.load(tmp_path / f"{family}-{when}.pt") for when in ("before", "after"))
        assert torch.equal(after, before), family


def test_what_is_saved_opens_again(saved: Path) -> None:
    view, again = half("qwen3_moe"), moestro.open(saved)
    assert torch.equal(logits_of(again.model, INPUTS), logits_of(view.model, INPUTS))
    assert [layer.num_experts for layer in again.layers] == [4, 4]
    assert again.model.config.num_experts == 4
    assert again.tokenizer("router expert nothing")["input_ids"] == [3, 2, 1]
    assert again.tokenizer.chat_template == "{{ messages }}"
    assert again.model.generation_config.temperature == 0.3
    assert again.model.generation_config.eos_token_id == [2, 7]
    notes = json.loads((saved / "moestro.json").read_text())
    assert notes["original_experts"] == {"1": HALF, "2": HALF}


def test_the_config_is_that_of_the_family(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert "moestro" not in (saved / "config.json").read_text()


def test_saving_under_an_edit_saves_the_model_without_it(saved: Path, tmp_path: Path) -> None:
    view = half("qwen3_moe")
    with view.edits(moestro.SwitchOff({(1, 0)})), view.observing(moestro.view.observe.SlotStats()):
        logits_of(view.model, INPUTS)
        view.save(tmp_path / "edited")
    ours, theirs = (all_files(folder) for folder in (tmp_path / "edited", saved))
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["config.json"] == theirs["config.json"]


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_who_may_read_a_checkpoint_follows_the_umask(umask: int, folder: int, file: int, tmp_path: Path) -> None:
    view, before = half("qwen3_moe"), os.umask(umask)
    try:
        view.save(tmp_path / "saved")
    finally:
        os.umask(before)
    assert (tmp_path / "saved").stat().st_mode & 0o777 == folder
    assert {p.name for p in (tmp_path / "saved").iterdir() if p.stat().st_mode & 0o777 != file} == set()


def test_bf16_stays_bf16(tmp_path: Path) -> None:
    view = moestro.open(tiny.build("gpt_oss", dtype=torch.bfloat16, num_hidden_layers=2).model)
    view.keep_experts({0: HALF, 1: HALF})
    again = moestro.open(view.save(tmp_path / "half"))
    for name, tensor in view.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)
        assert again.model.state_dict()[name].dtype == tensor.dtype
    assert torch.equal(logits_of(again.model, INPUTS), logits_of(view.model, INPUTS))


@pytest.mark.parametrize("family", LEARNED)
def test_num_bytes_is_the_size_of_the_saved_weights(family: str, tmp_path: Path) -> None:
    for view in (moestro.open(make(family).model), half(family)):
        file = view.save(tmp_path / "saved", overwrite=True) / "model.safetensors"
        header = int.from_bytes(file.read_bytes()[:8], "little")
        assert view.num_bytes == file.stat().st_size - 8 - header


@pytest.mark.parametrize("family", [*LEARNED, "gemma4"])
def test_different_numbers_per_layer_are_saved_where_the_family_can_or_refused(family: str, tmp_path: Path) -> None:
    view = moestro.open((make(family) if family in tiny.OVERRIDES else tiny.build(family)).model)
    last = view.layers[-1].index
    view.keep_experts({last: HALF})
    before = logits_of(view.model, INPUTS)
    try:
        view.save(tmp_path / "uneven")
    except ValueError as error:
        refused = re.search(r"one number of experts for all layers.*\[4, 8\].*pad_to_uniform", str(error))
        assert refused, error  # noqa: PT017
        assert not list(tmp_path.iterdir())
        view.keep_experts({layer.index: HALF for layer in view.layers[:-1]})
        view.save(tmp_path / "even")
        assert [layer.num_experts for layer in moestro.open(tmp_path / "even").layers] == [4] * len(view.layers)
    else:
        again = moestro.open(tmp_path / "uneven")
        assert [layer.num_experts for layer in again.layers] == [layer.num_experts for layer in view.layers]
        assert torch.equal(logits_of(again.model, INPUTS), before)
    assert_close(logits_of(view.model, INPUTS)[0], logits_of(view.model, INPUTS)[0], **FP32)


def test_what_is_no_plain_checkpoint_is_refused(tmp_path: Path) -> None:
    view = moestro.open(make("qwen3_moe").model)

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(96, 96)

        def forward(self, hidden: Any, indices: Any, weights: Any) -> Any:
            return self.map(hidden)

    view.replace_experts(1, Dense())
    with pytest.raises(ValueError, match=r"no plain Qwen3MoeForCausalLM any more: .*experts"):
        view.save(tmp_path / "replaced")

    holder = nn.Module()
    holder.inside = make("qwen3_moe").model
    with pytest.raises(ValueError, match="no transformers model"):
        moestro.open(holder).save(tmp_path / "holder")
    assert not list(tmp_path.iterdir())


# --- overwriting and failing -----------------------------------------------------------------------------------------


def test_an_existing_directory_is_only_overwritten_when_asked(copied: Path) -> None:
    view, before = half("qwen3_moe"), all_files(copied)
    (copied / "stray.txt").write_text("from before")
    with pytest.raises(FileExistsError, match="overwrite"):
        view.save(copied)
    assert all_files(copied).keys() - before.keys() == {"stray.txt"}
    with pytest.raises(FileExistsError, match=r"did not write stray\.txt"):
        view.save(copied, overwrite=True)
    (copied / "stray.txt").unlink()
    assert all_files(copied) == before
    view.save(copied, overwrite=True)
    assert all_files(copied)["model.safetensors"] == before["model.safetensors"]
    assert [p.name for p in copied.parent.iterdir()] == [copied.name]


def test_a_file_or_a_folder_one_stands_in_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = half("qwen3_moe")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        view.save(tmp_path / "file", overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="not overwritten"):
        view.save(".", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


class Full(Exception):
    """What the safetensors library raises, whose errors are no OSError."""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (Full("Error while serializing: I/O error: No space left on device (os error 28)"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ValueError("anything"), ValueError),
    ],
)
def test_a_save_that_fails_leaves_what_was_there(
    copied: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException], overwrite: bool
) -> None:
    view, before = half("qwen3_moe"), all_files(copied.parent)
    config = view.model.config

    write, written = Writer.write, []

    def half_way(self: Writer, name: str, tensor: torch.Tensor) -> None:
        write(self, name, tensor)
        written.append(name)
        if len(written) == 10:
            raise error

    monkeypatch.setattr(Writer, "write", half_way)
    target = copied if overwrite else copied.parent / "new"
    with pytest.raises(raised) as caught:
        view.save(target, overwrite=overwrite)
    if raised is OSError:
        assert "nothing is left behind" in str(caught.value)
        assert caught.value.errno == errno.ENOSPC
    assert all_files(copied.parent) == before
    assert {p.name for p in copied.parent.iterdir()} == {copied.name}
    assert view.model.config is config


def test_an_interrupt_while_moving_into_place_loses_nothing(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = all_files(copied), Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if Path(target) == copied and self.name != copied.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), complete_directory(copied, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert all_files(copied) == before
    assert [p.name for p in copied.parent.iterdir()] == [copied.name]


def test_too_small_a_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = half("qwen3_moe")
    usage = shutil.disk_usage(tmp_path)._replace(free=view.num_bytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=rf"needs {view.num_bytes:,} bytes and the disk has {usage.free:,} left"):
        view.save(tmp_path / "new")
    assert not list(tmp_path.iterdir())


# --- incomplete checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    model = moestro.open(saved).model
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def test_a_sharded_checkpoint_opens(sharded: Path, saved: Path) -> None:
    assert torch.equal(
        logits_of(moestro.open(sharded).model, INPUTS), logits_of(moestro.open(str(saved)).model, INPUTS)
    )


def cut(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


WEIGHTS = "model.safetensors"
BROKEN: list[tuple[str, Callable[[Path], Any], type[Exception], str]] = [
    ("no config", lambda p: (p / "config.json").unlink(), FileNotFoundError, "no config.json"),
    ("no weights", lambda p: (p / WEIGHTS).unlink(), FileNotFoundError, "no safetensors weights"),
    ("cut short", lambda p: cut(p / WEIGHTS, -1), ValueError, f"{WEIGHTS} is truncated"),
    ("cut in the header", lambda p: cut(p / WEIGHTS, 60), ValueError, "not even its header"),
    ("empty", lambda p: cut(p / WEIGHTS, 0), ValueError, "truncated"),
    (
        "a pointer",
        lambda p: (p / WEIGHTS).write_text("version https://git-lfs"),
        ValueError,
        "truncated|no safetensors",
    ),
    ("only pickles", lambda p: (p / WEIGHTS).rename(p / "pytorch_model.bin"), FileNotFoundError, "only pytorch_model"),
]


@pytest.mark.parametrize(("damage", "error", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_an_incomplete_checkpoint_is_refused(
    copied: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    damage(copied)
    with pytest.raises(error, match=message) as caught:
        moestro.open(copied)
    assert str(copied) in str(caught.value)


def test_a_missing_or_truncated_shard_is_named(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    cut(second, -5)
    with pytest.raises(ValueError, match=f"{second.name} is truncated"):
        moestro.open(sharded)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=f"misses the shard {first.name}"):
        moestro.open(sharded)


def test_the_card_of_a_model_from_memory_tells_what_was_cut(tmp_path: Path) -> None:
    view = moestro.open(make("qwen3_moe").model)
    view.keep_experts({layer.index: range(4) for layer in view.layers})
    view.save(tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "moestro.json").read_text())["experts"] == {"1": [4, 8], "2": [4, 8]}
    assert "4 in each of 2 layers, 8 before" in (tmp_path / "cut" / "README.md").read_text()
