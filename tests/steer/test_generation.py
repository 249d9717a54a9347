"""`moestro generate` and `moestro steer`, as a user runs them, on the bundled model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList
from typer.testing import CliRunner

import moestro
from moestro import SwitchOff
from moestro.cli import app
from moestro.steer.generation import generate, prompt_ids
from moestro.steer.steering import Steering


@pytest.fixture(scope="module")
def quartet():
    return moestro.open("quartet")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    code, prose = tmp_path / "code.txt", tmp_path / "prose.txt"
    code.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(10)))
    prose.write_text("".join(f"The old man walked home on day {i}.\n" for i in range(20)))
    return code, prose


def run(*args: Any) -> str:
    result = CliRunner().invoke(app, [*map(str, args)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_pieces_come_as_they_are_made_and_join_to_the_text(quartet) -> None:
    pieces: list[str] = []
    text = generate(quartet, "The three", on_text=pieces.append, max_new_tokens=12, chat=False)
    ids = prompt_ids(quartet, "The three", chat=False)
    whole = quartet.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "".join(pieces) == text == quartet.tokenizer.decode(whole, skip_special_tokens=True)
    assert len(pieces) > 3


def test_steering_acts_while_generating_and_not_afterwards(quartet) -> None:
    layer = quartet.layers[2].index
    setup = Steering.of(quartet, SwitchOff({(layer, e) for e in range(28)}))
    settings: dict[str, Any] = dict(max_new_tokens=16, chat=False)
    plain = generate(quartet, "The three", **settings)
    steered = generate(quartet, "The three", steering=[setup], **settings)
    with quartet.edits(*setup.build()):
        by_hand = generate(quartet, "The three", **settings)
    assert steered == by_hand != plain
    assert generate(quartet, "The three", **settings) == plain


def test_sampling_repeats_by_seed(quartet) -> None:
    texts = [generate(quartet, "The", temperature=1.0, seed=s, max_new_tokens=12, chat=False) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(prompt=" "), "prompt is empty"),
        (dict(prompt="a", max_new_tokens=0), "generate 1 or more"),
        (dict(prompt="a", temperature=-1.0), "greedy"),
        (dict(prompt="a", top_p=0.0), r"lies in \(0, 1\]"),
        (dict(prompt="a " * 3000), "reads at most"),
    ],
)
def test_bad_settings_are_refused(quartet, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(quartet, **settings)


def test_a_file_is_learned_shown_and_used(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    told = run("steer", "learn", "quartet", "--toward", files[0], "--against", files[1], "--top", 3, "--out", out)
    assert "p, corrected" in told
    setup = Steering.load(out)
    assert setup.edits[0]["kind"] == "soft_steer"
    assert sum(map(len, setup.edits[0]["experts"].values())) == 3
    assert "20 texts) against prose.txt (20)" in setup.learned_from
    assert "it fits quartet" in run("steer", "show", out, "--model", "quartet")
    shown = run("generate", "quartet", "The three", "--steer", out, "--compare", "--max-new-tokens", 5)
    assert "without steering" in shown
    with pytest.raises(FileExistsError, match="--overwrite"):
        run("steer", "learn", "quartet", "--toward", files[0], "--against", files[1], "--out", out)


def test_the_learned_experts_are_those_that_the_texts_use_more(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    args = ("--toward", files[0], "--against", files[1], "--top", 2, "--layers", "2-3", "--action", "off")
    run("steer", "learn", "quartet", *args, "--out", out)
    chosen = {(int(layer), e) for layer, ids in Steering.load(out).edits[0]["experts"].items() for e in ids}
    view = moestro.open("quartet")
    from moestro.analyze.profiles import TextProfiles

    def use(path: Path) -> dict[int, torch.Tensor]:
        batches = [view.tokenizer(line, return_tensors="pt") for line in path.read_text().splitlines()]
        data = [{"input_ids": b["input_ids"]} for b in batches]
        (found,) = view.observe(data, [TextProfiles()], progress=False)
        return {layer: found.frequency[layer].mean(0) for layer in (2, 3)}

    more, less = use(files[0]), use(files[1])
    ranked = sorted(((float(more[i][e] - less[i][e]), (i, e)) for i in (2, 3) for e in range(32)), reverse=True)
    assert len(chosen & {member for _, member in ranked[:4]}) == 2


def test_setups_are_written_by_hand(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    run("steer", "set", "quartet", "--off", "3:17", "--off", "4:2", "--gain", "2:5=2", "--note", "quiet", "--out", out)
    shown = run("steer", "show", out)
    for part in ("switch_off", "gain", "quiet", "set by hand"):
        assert part in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to steer"),
        (("--off", "3-1"), "write LAYER:NUMBER, as in 3:17"),
        (("--off", "9:1"), "decoder layer 9 has no experts"),
        (("--gain", "3:1"), "3:17=0.5"),
    ],
)
def test_bad_setups_are_refused(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("steer", "set", "quartet", *options, "--out", tmp_path / "s.json")
    assert not [*tmp_path.iterdir()]


def test_another_models_file_is_refused_before_anything_runs(tmp_path: Path, quartet) -> None:
    setup = Steering.of(quartet, SwitchOff({(3, 1)}))
    setup.model = setup.model.model_copy(update={"routers": "other"})
    setup.save(tmp_path / "s.json")
    with pytest.raises(ValueError, match="another checkpoint"):
        run("generate", "quartet", "The", "--steer", tmp_path / "s.json")
    with pytest.raises(ValueError, match="give a file with --steer"):
        run("generate", "quartet", "The", "--compare")


def test_dense_models_generate_without_steering() -> None:
    assert run("generate", "solo", "The three", "--max-new-tokens", 3).strip()


def test_processors_come_with_the_setup(quartet) -> None:
    with Steering.of(quartet, SwitchOff({(3, 1)})).on(quartet) as processors:
        assert isinstance(processors, LogitsProcessorList)
