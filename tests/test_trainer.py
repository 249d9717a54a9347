"""The trainer: the same weights however a run is divided, stopped or resumed, and errors before or at the fault."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from moestro.bundled import bundled_path
from moestro.cli import app
from moestro.directories import lock
from moestro.models.lm import MoELMForCausalLM
from moestro.report import train_page
from moestro.train.config import read_config
from moestro.train.logs import read_metrics, scalars
from moestro.train.packing import Rows, batch_rows
from moestro.train.plan import Plan
from moestro.train.trainer import Trainer
from native_lm import SMALL, small_lm

LENGTH = 64
EXAMPLE = Path(__file__).parents[1] / "examples" / "train-small.yaml"


def some_rows(count: int = 24, seed: int = 0) -> Rows:
    """Two domains: repeated words, and counting up."""
    rng = np.random.default_rng(seed)
    words = np.repeat(rng.integers(3, 30, (count, LENGTH // 4)), 4, axis=1)
    counting = 30 + (rng.integers(0, 30, (count, 1)) + np.arange(LENGTH)) % 30
    domain = np.arange(count) % 2
    return Rows(np.where(domain[:, None] == 0, words, counting).astype(np.uint16), domain, ["words", "counting"])


def plan(**changes: Any) -> Plan:
    return Plan(**{"steps": 6, "batch_rows": 4, "warmup_steps": 2, "log_every": 2, "save_every": 2, **changes})


def trainer(folder: Path, model: Any = None, rows: Rows | None = None, **changes: Any) -> Trainer:
    model = small_lm(max_position_embeddings=LENGTH, router_losses={"load_balance": 0.01}) if model is None else model
    return Trainer(model, rows or some_rows(), plan(**changes), folder, heldout=some_rows(4, 1), progress=False)


def qwen(kind: str = "moe") -> Any:
    torch.manual_seed(0)
    if kind == "dense":
        return Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in SMALL.items() if "expert" not in k and "moe" not in k}))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, norm_topk_prob=True))


def test_the_rate_warms_up_and_decays() -> None:
    cosine = Plan(steps=1000, warmup_steps=100, peak_rate=1.0, final_share=0.1)
    rates = [cosine.rate(step) for step in range(1001)]
    assert rates[0] == 0.01
    assert rates[99] == rates[100] == 1.0
    assert rates[550] == pytest.approx(0.55)
    assert rates[1000] == pytest.approx(0.1)
    trapezoid = Plan(steps=1000, warmup_steps=100, peak_rate=1.0, schedule="trapezoid", decay_share=0.35)
    rates = [trapezoid.rate(step) for step in range(1001)]
    assert rates[99] == rates[400] == rates[649] == 1.0
    assert rates[650] > rates[900] > rates[1000] == 0.0


def test_every_row_comes_once_per_pass() -> None:
    drawn = np.concatenate([batch_rows(10, 4, step, 7) for step in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert list(drawn[:10]) != list(drawn[10:])
    assert list(batch_rows(10, 4, 2, None)) == [8, 9, 0, 1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["native", "moe", "dense"])
def test_training_lowers_the_loss_of_every_domain(kind: str, precision: str, tmp_path: Path) -> None:
    losses = {"load_balance": 0.01} if kind == "moe" else None
    model = None if kind == "native" else qwen(kind)
    run = trainer(tmp_path, model, steps=20, peak_rate=1e-2, precision=precision, router_losses=losses)
    before = run.evaluate(run.heldout, 2)
    run.run()
    after = run.evaluate(run.heldout, 2)
    assert after.keys() == before.keys() == {"words", "counting"}
    assert all(after[name] < before[name] - 0.2 for name in after)
    trained, held = ([r for r in read_metrics(tmp_path) if key in r] for key in ("loss", "heldout"))
    assert [r["step"] for r in trained] == list(range(2, 21, 2))
    assert held[-1]["heldout_domains"] == pytest.approx(after)
    assert trained[-1]["domains"].keys() == {"words", "counting"}
    assert trained[-1]["losses"].keys() == (set() if kind == "dense" else {"load_balance"})
    assert [r["layer"] for r in trained[-1]["routers"]] == ([] if kind == "dense" else [0, 1])
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert type(model or run.model).from_pretrained(tmp_path / "model").lm_head.weight.shape == (61, 32)
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "counting" in page


def test_weights_and_buffers_keep_fp32_where_it_matters(tmp_path: Path) -> None:
    model = small_lm(router={"kind": "sigmoid", "bias_rate": 1e-3})
    run = trainer(tmp_path, model, precision="bf16")
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(b.dtype == torch.float32 for b in model.buffers() if b.is_floating_point())
    run.train_step()
    bias = model.model.layers[0].mlp.router.e_score_correction_bias
    assert bias.abs().max() == pytest.approx(1e-3)
    for name, weight in run.masters.weights.items():
        assert torch.equal(weight.bfloat16(), run.masters.parameters[name])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_micro_batches_add_up_to_the_batch(precision: str, tmp_path: Path) -> None:
    whole, parts = (
        trainer(tmp_path / str(micro), small_lm(), precision=precision, micro_rows=micro) for micro in (4, 1)
    )
    for _ in range(2):
        a, b = whole.train_step(), parts.train_step()
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5 if precision == "fp32" else 1e-2)
    assert_close(torch.sort(a["rows"]).values, torch.sort(b["rows"]).values, atol=0.02, rtol=0.01)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("router", ["top_k", "random", {"kind": "sigmoid", "bias_rate": 1e-2}])
def test_a_resumed_run_is_the_uninterrupted_one(router: Any, tmp_path: Path) -> None:
    def start(name: str) -> Trainer:
        return trainer(tmp_path / name, small_lm(router=router), precision="bf16")

    straight = start("straight")
    losses = [straight.train_step()["loss"] for _ in range(4)]
    stopped = start("stopped")
    again = [stopped.train_step()["loss"] for _ in range(2)]
    stopped.save()
    resumed = start("stopped")
    assert resumed.step == 2
    assert again + [resumed.train_step()["loss"] for _ in range(2)] == losses
    assert all(torch.equal(a, b) for a, b in zip(straight.weights, resumed.weights))
    assert all(torch.equal(a, b) for a, b in zip(straight.model.buffers(), resumed.model.buffers()))


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, {tests!r})\n"
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path; from test_trainer import trainer\n"
        "trainer(Path({folder!r}), steps=24, save_every=3).run()"
    )
    folder = tmp_path / "killed"
    script = code.format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not (folder / "metrics.jsonl").exists() or len(read_metrics(folder)) < 2:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = trainer(folder, steps=24, save_every=3)
    assert 0 < resumed.step < 24
    straight = trainer(tmp_path / "straight", steps=24, save_every=1000)
    resumed.run()
    straight.run()
    assert all(torch.equal(a, b) for a, b in zip(straight.weights, resumed.weights))
    steps = [record["step"] for record in read_metrics(folder) if "loss" in record]
    assert steps == list(range(2, 25, 2))


def test_a_changed_config_is_told(tmp_path: Path) -> None:
    trainer(tmp_path).save()
    with pytest.raises(ValueError, match=r"plan\.peak_rate: 0\.003 in the checkpoint, 0\.001 now") as error:
        trainer(tmp_path, small_lm(num_experts=4), peak_rate=1e-3)
    assert "model.num_experts: 8 in the checkpoint, 4 now" in str(error.value)
    assert "start anew in another directory" in str(error.value)
    with pytest.raises(ValueError, match=r"data\.digest"):
        trainer(tmp_path, rows=some_rows(seed=5))
    trainer(tmp_path, log_every=5)  # what only reports may change


def test_impossible_runs_are_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the data has 3 rows of 64 tokens, less than one batch of 4"):
        trainer(tmp_path, rows=some_rows(3))
    with pytest.raises(ValueError, match="rows of 64 tokens for a model of 32 positions"):
        trainer(tmp_path, small_lm(max_position_embeddings=32))
    with pytest.raises(ValueError, match="batch_rows=4 is not a multiple of micro_rows=3"):
        plan(micro_rows=3)
    with pytest.raises(ValueError, match="router loss 'balance' is not known; there are load_balance"):
        trainer(tmp_path, qwen(), router_losses={"balance": 0.1})
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("place", ["mlp.router", "self_attn.o_proj"])
def test_a_loss_that_is_nan_stops_with_the_place(place: str, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train_step()
    run.save()
    with torch.no_grad():
        run.model.get_submodule(f"model.layers.1.{place}").weight.view(-1)[5] = float("nan")
    with pytest.raises(FloatingPointError, match=rf"the loss is nan at step 1; .* model\.layers\.1\.{place} ") as error:
        run.train_step()
    assert str(tmp_path / "checkpoint.pt") in str(error.value)
    assert all(
        w.isfinite().all() for w in torch.load(tmp_path / "checkpoint.pt", weights_only=True)["weights"].values()
    )


def test_health_counts_dead_and_dropped(tmp_path: Path) -> None:
    model = small_lm(num_experts=4)
    run = trainer(tmp_path, model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.weight.zero_()  # ties: the first two experts take all
    run.objective(run._ids(np.arange(4)))
    for record in run.health.report(run.processes):
        assert record["dead"] == 2
        assert record["max_violation"] == pytest.approx(1.0)
        assert record["entropy"] == pytest.approx(0.5)
        assert (record["dropped"], record["slots"]) == (0.0, 2.0)


def test_scalars_are_named_by_their_path() -> None:
    record = {"step": 3, "loss": 1.5, "domains": {"a": 2}, "routers": [{"layer": 4, "dead": 1}]}
    assert dict(scalars(record)) == {"loss": 1.5, "domains/a": 2.0, "routers/4/dead": 1.0}


def test_a_page_of_nothing_is_a_page() -> None:
    assert "Nothing was reported yet" in train_page([], name="<none>", facts={})
    assert "&lt;none&gt;" in train_page([], name="<none>", facts={})


# ------------------------------------------------------------------------------------------------ moestro train


def config_file(folder: Path, **changes: Any) -> Path:
    content = yaml.safe_load(EXAMPLE.read_text())
    content["data"] = {"tasks": {"arithmetic": 400, "sorting": 300}, "row": 64}
    content["plan"] = {"steps": 4, "batch_rows": 4, "warmup_steps": 1, "save_every": 2}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        content[section] = content[section] | {name: value} if name else value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_command_trains_and_goes_on(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    dry = CliRunner().invoke(app, ["train", str(path), "--dry-run", "--out", str(tmp_path / "run")])
    assert dry.exit_code == 0, dry.output
    assert "active per token" in dry.output
    assert not (tmp_path / "run").exists()
    done = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert MoELMForCausalLM.from_pretrained(tmp_path / "run" / "model").config.num_experts == 16
    again = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "run")])
    assert "going on at step 4 of 4" in again.output
    other = CliRunner().invoke(app, ["train", str(config_file(tmp_path, plan__seed=1)), "--out", str(tmp_path / "run")])
    assert "plan.seed: 0 in the checkpoint, 1 now" in str(other.exception)


def refusal(*arguments: str) -> str:
    ended = CliRunner().invoke(app, ["train", *arguments])
    assert ended.exit_code in (1, 2)
    return str(ended.exception) if ended.exit_code == 1 else ended.output


def test_a_run_is_written_to_a_folder_of_its_own(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i} of many"}) + "\n" for i in range(200)))
    path = str(config_file(tmp_path, data={"sources": [str(texts)], "row": 64}))
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "checkpoint.pt").write_text("mine")
    assert "is no folder of a moestro run (it holds checkpoint.pt)" in refusal(path, "--out", str(foreign))
    assert "is a file" in refusal(path, "--out", path)
    for out in (texts, texts / "run", tmp_path, tmp_path / "texts" / ".." / "texts"):
        assert "that model or data are read from" in refusal(path, "--out", str(out))
    assert "an empty string names no file" in refusal(path, "--out", "")
    model = str(config_file(tmp_path, model={"checkpoint": str(bundled_path("quartet"))}))
    assert "lies in the directory" in refusal(model, "--out", str(bundled_path("quartet")) + "/run")
    assert {entry.name for entry in tmp_path.iterdir()} == {"texts", "mine", "config.yaml"}
    assert (foreign / "checkpoint.pt").read_text() == "mine"


def test_a_run_on_other_data_is_refused_with_the_difference_and_left_whole(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert CliRunner().invoke(app, ["train", str(config_file(tmp_path)), "--out", str(run)]).exit_code == 0
    before = {file: file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file()}
    told = refusal(str(config_file(tmp_path, data={"tasks": {"arithmetic": 300}, "row": 32})), "--out", str(run))
    assert "data.row: 64 in the checkpoint, 32 now" in told
    assert "another directory" in told
    with lock(run):
        assert "is being written by process" in refusal(str(config_file(tmp_path)), "--out", str(run))
    assert {file: file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file()} == before


@pytest.mark.slow
def test_sigterm_ends_a_run_that_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    path = config_file(tmp_path, plan={"steps": 60, "batch_rows": 4, "warmup_steps": 1, "save_every": 2})
    main = "import sys; sys.argv[0] = 'moestro'; from moestro.cli import main; main()"
    command = [sys.executable, "-c", main, "train", str(path), "--threads", "1", "--out"]
    process = subprocess.Popen([*command, str(tmp_path / "run")], stderr=subprocess.PIPE)
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    assert b"the same command goes on at step" in b" ".join(told.split())
    assert not list(tmp_path.glob(".run*"))
    assert not (tmp_path / "run" / "checkpoint.pt.part").exists()
    for name in ("run", "whole"):
        assert subprocess.run([*command, str(tmp_path / name)]).returncode == 0
    one, other = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("run", "whole"))
    assert all(torch.equal(one["weights"][name], weight) for name, weight in other["weights"].items())


def test_what_may_be_published_of_a_run_holds_no_path(tmp_path: Path) -> None:
    texts = tmp_path / "secret"
    texts.mkdir()
    (texts / "a.jsonl").write_text("".join(json.dumps({"text": f"whisper {i} of many"}) + "\n" for i in range(400)))
    data = {"sources": [f"d={texts}"], "row": 64}
    model = tmp_path / "hidden-place"
    shutil.copytree(str(bundled_path("quartet")), model)
    path = config_file(
        tmp_path, data=data, model={"checkpoint": str(model)}, plan={"steps": 1, "batch_rows": 1, "warmup_steps": 0}
    )
    done = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    for file in [tmp_path / "run" / "report.html", *(tmp_path / "run" / "model").iterdir()]:
        for word in (str(tmp_path), "whisper"):
            if file.name != "tokenizer.json" or word != "whisper":  # a vocabulary has words
                assert word.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_expert": 4}, "model: num_expert is not known; did you mean num_experts?"),
        ({"plan__warmup": 4}, "plan.warmup is not known; did you mean warmup_steps?"),
        ({"plan__tokens": 10_000}, "plan: give either tokens or steps"),
        ({"plan": {"tokens": 100, "batch_rows": 4}}, "plan: tokens=100 is less than one batch of 256 tokens"),
        ({"plan__precision": "fp8"}, "plan.precision: Input should be 'fp32' or 'bf16' (given 'fp8')"),
        ({"data__rows": 4}, "data.rows is not known; did you mean row?"),
        ({"data": {"tasks": {"chess": 4}}}, "data: tasks: 'chess' is not known; there are arithmetic"),
        ({"model": {"checkpoint": "x", "num_experts": 4}}, "model: a checkpoint brings its own sizes"),
    ],
)
def test_a_wrong_key_is_answered_with_the_known_ones(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read_config(config_file(tmp_path, **changes))
    assert message in str(error.value)


def test_the_example_is_valid() -> None:
    config = read_config(EXAMPLE)
    assert config.plan_for(config.data.row).steps == 195


@pytest.mark.slow  # two processes, which import torch twice
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path; from native_lm import small_lm; from test_trainer import trainer\n"
        "model = small_lm(router={'kind': 'sigmoid', 'bias_rate': 1e-2}, router_losses={'load_balance': 0.01})\n"
        "trainer(Path(sys.argv[1]), model, micro_rows=2).run()"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29717", "WORLD_SIZE": "2"}
    env |= {"ACCELERATE_USE_CPU": "true"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "two")], env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(2)
    ]
    alone = subprocess.run([sys.executable, "-c", script, str(tmp_path / "one")], check=True)
    assert alone.returncode == 0
    assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    for part in ("weights", "buffers"):
        for name, tensor in one[part].items():
            assert_close(two[part][name], tensor, atol=1e-5, rtol=1e-3, msg=name)
    records = [[r for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("one", "two")]
    for a, b in zip(*records):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["domains"] == pytest.approx(b["domains"], abs=1e-3)
        assert json.dumps(a["routers"]) == json.dumps(b["routers"])
