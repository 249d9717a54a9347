"""A streamed model gives what the model in memory gives: statistics, saved weights. It resumes and refuses clearly."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import moestro
from families import tiny
from moestro.fitting.evaluate import HeldoutLoss
from moestro.view.events import MoEEvent
from moestro.view.observe import ExpertCounts, LayerOutputs, RoutingTrace, SlotStatistics, SlotStats

FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "mixtral"]
PADDING = ["none", "left", "right"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Directory of a tiny saved model; each is made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def make(family: str, dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{family}-{dtype}"
        tiny.build(family, dtype=dtype).model.save_pretrained(path)
        return path

    return make


@cache
def batches(family: str = "qwen3_moe") -> list[dict[str, torch.Tensor]]:
    small = tiny.build(family)
    inputs = [small.inputs(B=2, T=8 + i, seed=i, padding=side) for i, side in enumerate(PADDING)]
    return [{k: b[k] for k in ("input_ids", "attention_mask")} for b in inputs]


def stream(path: Path, **options):
    return moestro.open(path, stream=True, **options)


def assert_same_statistics(ours: SlotStatistics, theirs: SlotStatistics) -> None:
    assert ours.tokens == theirs.tokens
    assert ours.by_domain.keys() == theirs.by_domain.keys()
    for index, slots in ours.by_domain.items():
        for name, table in vars(slots).items():
            assert torch.equal(table, getattr(theirs.by_domain[index], name)), (index, name)


def routers_of(view) -> set[str]:
    return {f"{layer.name}.{layer.router_name}.weight" for layer in view.layers}


def resident(view) -> set[str]:
    return {name for name, p in view.model.named_parameters() if not p.is_meta}


def loss_of(model, data) -> tuple[float, int]:
    """Mean loss of each token that follows another, from the logits of the whole model, in float64."""
    losses = []
    for batch in data:
        with torch.no_grad():
            predicted = model(**batch, use_cache=False).logits.double().log_softmax(-1)
        for row, ids, mask in zip(predicted, batch["input_ids"], batch["attention_mask"]):
            real = mask.nonzero().flatten().tolist()
            losses += [-float(row[a, ids[b]]) for a, b in pairwise(real)]
    return sum(losses) / len(losses), len(losses)


def assert_same_loss(path: Path, data) -> None:
    """Held-out loss of the streamed model is that of the one in memory, bit for bit, and what its logits say."""
    whole, streamed = moestro.open(path), stream(path)
    expected, counts = whole.observe(data, [HeldoutLoss(), ExpertCounts()], progress=False)
    found, streamed_counts = streamed.observe(data, [HeldoutLoss(), ExpertCounts()], progress=False)
    assert found == expected
    assert found["all"] == pytest.approx(loss_of(whole.model, data), rel=1e-5)
    assert all(torch.equal(streamed_counts[i], count) for i, count in counts.items())
    assert not [name for name in resident(streamed) if "head" in name or "embed" in name or name.endswith("_proj")]


def halved(view) -> dict[int, list[int]]:
    return {layer.index: list(range(0, layer.num_experts, 2)) for layer in view.layers if layer.rule is not None}


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in sorted(path.glob("*.safetensors")) for k, t in load_file(file).items()}


def assert_same_weights(ours: Path, theirs: Path) -> None:
    a, b = weights_in(ours), weights_in(theirs)
    assert a.keys() == b.keys()
    assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_observed_and_saved_as_in_memory(family, checkpoint, tmp_path):
    path, data = checkpoint(family), batches(family)
    whole, streamed = moestro.open(path), stream(path)
    assert list(map(str, streamed.layers)) == list(map(str, whole.layers))
    assert streamed.num_bytes == whole.num_bytes == streamed.original_bytes

    def run(view, trace: str):
        return view.observe(data, [SlotStats(), RoutingTrace(tmp_path / trace), LayerOutputs()], progress=False)

    in_memory, layerwise = run(whole, "a"), run(streamed, "b")
    assert_same_statistics(layerwise[0], in_memory[0])
    assert layerwise[1].collect().equals(in_memory[1].collect())
    assert all(torch.equal(layerwise[2][i][0], outputs) for i, (outputs, _) in in_memory[2].items())

    for view in (whole, streamed):
        view.keep_experts(halved(view))
    assert streamed.num_bytes == whole.num_bytes < streamed.original_bytes
    whole.save(tmp_path / "whole")
    streamed.save(tmp_path / "streamed")
    assert_same_weights(tmp_path / "streamed", tmp_path / "whole")
    for name in ("config.json", "moestro.json", "generation_config.json"):
        assert (tmp_path / "streamed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_bfloat16_shards_and_reload_in_plain_transformers(checkpoint, tmp_path):
    path = checkpoint("qwen3_moe", torch.bfloat16)
    whole, streamed = moestro.open(path), stream(path)
    (seen,) = streamed.observe(batches(), [SlotStats()], progress=False)
    assert_same_statistics(seen, whole.observe(batches(), [SlotStats()], progress=False)[0])
    for view in (whole, streamed):
        view.keep_experts(halved(view))
    whole.save(tmp_path / "whole")
    streamed.save(tmp_path / "streamed", shard_bytes=50_000)
    assert len(list((tmp_path / "streamed").glob("model-*-of-*.safetensors"))) > 2
    assert_same_weights(tmp_path / "streamed", tmp_path / "whole")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    with torch.no_grad():
        assert torch.equal(plain(**batches()[0]).logits, whole.model(**batches()[0]).logits)
    again = stream(tmp_path / "streamed")
    assert [layer.num_experts for layer in again.layers] == [layer.num_experts for layer in whole.layers]


def test_keeps_merges_and_top_k_add_up(checkpoint, tmp_path):
    path = checkpoint("qwen3_moe")
    for view, name in ((moestro.open(path), "whole"), (stream(path), "streamed")):
        view.keep_experts({layer.index: range(1, layer.num_experts) for layer in view.layers})
        clusters = {layer.index: [[0, 3], *([e] for e in (1, 2, 4))] for layer in view.layers}
        view.merge_experts(clusters, {layer.index: torch.arange(1.0, layer.num_experts + 1) for layer in view.layers})
        view.set_top_k(1)
        view.save(tmp_path / name)
        (tmp_path / f"{name}.txt").write_text(repr(view.observe(batches(), [SlotStats()], progress=False)))
    assert_same_weights(tmp_path / "streamed", tmp_path / "whole")
    assert (tmp_path / "streamed.txt").read_text() == (tmp_path / "whole.txt").read_text()
    for name in ("config.json", "moestro.json"):
        assert (tmp_path / "streamed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_no_weights_stay_but_the_routers(checkpoint):
    view = stream(checkpoint("qwen3_moe"))
    view.observe(batches(), [SlotStats()], progress=False)
    assert resident(view) == routers_of(view)
    view.observe(batches(), [HeldoutLoss()], progress=False)
    assert resident(view) == routers_of(view)


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_loss_is_that_of_the_whole_model(family, checkpoint):
    assert_same_loss(checkpoint(family), batches(family))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0, 2, 3]}),  # no expert in the last layers
        ("qwen3_moe", {"tie_word_embeddings": True}),
        ("mixtral", {"output_router_logits": True}),
        ("gemma4", {"final_logit_softcapping": 1.5, "tie_word_embeddings": True}),
        ("granitemoe", {"logits_scaling": 3.0}),
        ("cohere2_moe", {"logit_scale": 0.3}),
    ],
)
def test_held_out_loss_minds_what_lies_behind_the_experts(family, changes, tmp_path):
    tiny.build(family, **changes).model.save_pretrained(tmp_path)
    assert_same_loss(tmp_path, batches(family))


def test_held_out_loss_of_a_language_model_in_a_larger_one(tmp_path):
    tiny.build("qwen3_vl_moe", towers=True).model.save_pretrained(tmp_path)
    assert_same_loss(tmp_path, batches("qwen3_vl_moe"))


def test_no_logits_without_a_language_head(checkpoint, tmp_path):
    tiny.build("qwen3_moe").model.model.save_pretrained(tmp_path)
    for view in (stream(tmp_path), moestro.open(tmp_path)):
        with pytest.raises(ValueError, match="Qwen3MoeModel has no language head"):
            view.observe(batches(), [HeldoutLoss()], progress=False)
        assert view.observe(batches(), [SlotStats()], progress=False)
    with (
        pytest.raises(ValueError, match=r"view\.observe\(data, observers\) alone"),
        moestro.open(checkpoint("qwen3_moe")).observing(HeldoutLoss()),
    ):
        pass


def test_tied_embeddings_are_saved_once(tmp_path):
    small = tiny.build("qwen3_moe", tie_word_embeddings=True)
    small.model.save_pretrained(tmp_path / "tied")
    stored = weights_in(tmp_path / "tied")
    assert "lm_head.weight" not in stored
    shutil.copytree(tmp_path / "tied", tmp_path / "twice")  # as older tools wrote it
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "twice" / "model.safetensors", metadata={"format": "pt"})
    for name in ("tied", "twice"):
        stream(tmp_path / name).save(tmp_path / f"{name}-again")
        assert_same_weights(tmp_path / f"{name}-again", tmp_path / "tied")


def test_hidden_states_in_files_change_nothing(checkpoint, tmp_path):
    view = stream(checkpoint("deepseek_v3"))
    in_memory = view.observe(batches("deepseek_v3"), [SlotStats()], progress=False)[0]
    in_files = view.observe(batches("deepseek_v3"), [SlotStats()], progress=False, hidden_bytes=1)[0]
    assert_same_statistics(in_files, in_memory)


@pytest.mark.parametrize("hidden_bytes", [2**30, 1])
@pytest.mark.parametrize("family", ["gemma4", "inkling2"])
def test_layers_that_read_more_than_the_layer_before(family, hidden_bytes, tmp_path):
    """Gemma 4's last layers read keys and values of earlier ones; Inkling 2's layers all earlier outputs."""
    shared = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    tiny.build(family, **(shared if family == "gemma4" else {})).model.save_pretrained(tmp_path)
    data = batches(family)
    (expected,) = moestro.open(tmp_path).observe(data, [SlotStats()], progress=False)
    (seen,) = stream(tmp_path).observe(data, [SlotStats()], progress=False, hidden_bytes=hidden_bytes)
    assert_same_statistics(seen, expected)


class Interrupted(SlotStats):
    """Fails the first time it sees the layer `at`."""

    at: int | None = None

    def update(self, event: MoEEvent) -> None:
        if event.layer == Interrupted.at and event.tokens.sample.max() > 1:
            raise KeyboardInterrupt
        super().update(event)


def test_goes_on_after_an_interrupt(checkpoint, tmp_path, monkeypatch):
    view = stream(checkpoint("qwen3_moe"))
    (expected,) = view.observe(batches(), [SlotStats()], progress=False)
    monkeypatch.setattr(Interrupted, "at", 2)
    with pytest.raises(KeyboardInterrupt):
        view.observe(batches(), [Interrupted()], progress=False, work=tmp_path / "work")
    assert all(p.is_meta for layer in view.layers for p in layer.experts.parameters())
    monkeypatch.setattr(Interrupted, "at", 1)  # would fail if this layer ran again
    (resumed,) = view.observe(batches(), [Interrupted()], progress=False, work=tmp_path / "work")
    assert_same_statistics(resumed, expected)
    (known,) = view.observe(batches(), [Interrupted()], progress=False, work=tmp_path / "work")
    assert_same_statistics(known, expected)


class InterruptedLoss(HeldoutLoss):
    fails = True

    def update_logits(self, batch, ids, logits) -> None:
        if InterruptedLoss.fails and batch.tokens.sample.max() > 1:
            raise KeyboardInterrupt
        super().update_logits(batch, ids, logits)


def test_goes_on_after_an_interrupt_among_the_logits(checkpoint, tmp_path, monkeypatch):
    view = stream(checkpoint("qwen3_moe"))
    expected, _ = view.observe(batches(), [HeldoutLoss(), SlotStats()], progress=False)
    with pytest.raises(KeyboardInterrupt):
        view.observe(batches(), [InterruptedLoss(), Interrupted()], progress=False, work=tmp_path / "work")
    assert resident(view) == routers_of(view)
    monkeypatch.setattr(InterruptedLoss, "fails", False)
    monkeypatch.setattr(Interrupted, "at", 2)  # would fail if this layer ran again
    for _ in range(2):
        loss, _ = view.observe(batches(), [InterruptedLoss(), Interrupted()], progress=False, work=tmp_path / "work")
        assert loss == expected


class Deadly(list):
    """Batches that kill the process when they have been read `lives` times."""

    lives = 0

    def __getitem__(self, number):
        self.lives -= 1
        if self.lives == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


def die_while_observing(path: str, data: str, work: str) -> None:
    deadly = Deadly(torch.load(data))
    deadly.lives = 2 * len(deadly) + 2 * len(deadly) + 3  # two counts of the tokens, two layers, and a bit
    stream(Path(path)).observe(deadly, [SlotStats(), RoutingTrace(Path(work).parent / "trace")], work=work)


def test_goes_on_after_a_kill(checkpoint, tmp_path):
    path, work = checkpoint("qwen3_moe"), tmp_path / "work"
    torch.save(batches(), tmp_path / "data.pt")
    arguments = [str(path), str(tmp_path / "data.pt"), str(work)]
    code = f"import test_stream; test_stream.die_while_observing(*{arguments})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    layer = json.loads((work / "progress.json").read_text())["layer"]
    assert 1 <= layer <= 2
    trace = RoutingTrace(tmp_path / "not used")
    resumed = stream(path).observe(batches(), [SlotStats(), trace], progress=False, work=work)
    assert trace.path == tmp_path / "trace"
    whole = moestro.open(path).observe(batches(), [SlotStats(), RoutingTrace()], progress=False)
    assert_same_statistics(resumed[0], whole[0])
    assert resumed[1].collect().equals(whole[1].collect())


def observe_a_share(path: str, data: str, result: str) -> None:
    torch.distributed.init_process_group("gloo")
    (seen,) = stream(Path(path)).observe(torch.load(data), [SlotStats()], work=Path(result).parent / "work")
    torch.save({i: vars(slots) for i, slots in seen.by_domain.items()}, f"{result}{torch.distributed.get_rank()}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_batches(checkpoint, tmp_path):
    path = checkpoint("qwen3_moe")
    torch.save(batches(), tmp_path / "data.pt")
    arguments = [str(path), str(tmp_path / "data.pt"), str(tmp_path / "result")]
    code = f"import test_stream; test_stream.observe_a_share(*{arguments})"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as here: sums depend on it
    where = {**os.environ, **threads, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, cwd=Path(__file__).parent, env={**where, "RANK": str(r)}) for r in (0, 1)]
    assert [process.wait() for process in running] == [0, 0]
    (alone,) = stream(path).observe(batches(), [SlotStats()], progress=False)
    for rank in (0, 1):
        for index, slots in torch.load(tmp_path / f"result{rank}").items():
            torch.testing.assert_close(slots, vars(alone.by_domain[index]), rtol=1e-5, atol=1e-5)


def test_refuses_the_work_of_another_observation(checkpoint, tmp_path):
    path, work = checkpoint("qwen3_moe"), tmp_path / "work"
    view = stream(path)
    view.observe(batches()[:2], [SlotStats()], progress=False, work=work)
    with pytest.raises(ValueError, match="other data;"):
        view.observe(batches(), [SlotStats()], progress=False, work=work)
    with pytest.raises(ValueError, match="other observers;"):
        view.observe(batches()[:2], [LayerOutputs()], progress=False, work=work)
    with pytest.raises(ValueError, match="other checkpoint"):
        stream(checkpoint("mixtral")).observe(batches()[:2], [SlotStats()], progress=False, work=work)
    view.keep_experts(halved(view))
    with pytest.raises(ValueError, match="other recipe;"):
        view.observe(batches()[:2], [SlotStats()], progress=False, work=work)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files"):
        view.observe(batches(), [SlotStats()], progress=False, work=tmp_path / "mine")


def test_refuses_what_cannot_be_done(checkpoint, tmp_path):
    path = checkpoint("qwen3_moe")
    view = stream(path)
    with pytest.raises(ValueError, match="no token to observe"):
        view.observe([{"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.zeros(1, 3)}], [])
    with pytest.raises(ValueError, match="cannot serve top_k"):
        view.keep_experts({1: [1]})
    with pytest.raises(ValueError, match="stream=False"):
        view.replace_experts(1, torch.nn.Identity())
    with pytest.raises(ValueError, match="give the data"):
        view.observing(SlotStats())
    with pytest.raises(ValueError, match="is the directory"):
        view.save(path)
    with pytest.raises(FileNotFoundError):
        stream(tmp_path / "nowhere")
    assert view.num_bytes == view.original_bytes


def test_a_full_disk_is_told_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    view = stream(checkpoint("qwen3_moe"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(OSError, match="nothing was written"):
        view.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def edited(path: Path, target: Path, change) -> Path:
    """A copy of a checkpoint with changed tensors."""
    shutil.copytree(path, target)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_incomplete_checkpoints_are_refused(checkpoint, tmp_path):
    path = checkpoint("qwen3_moe")
    stream(path).save(tmp_path / "shards", shard_bytes=60_000)
    shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"model-00002-of-.* is truncated"):
        stream(tmp_path / "shards")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="misses the shard model-00002"):
        stream(tmp_path / "shards")
    lacking = edited(path, tmp_path / "lacking", lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors .* model.layers.1.input_layernorm.weight"):
        stream(lacking)
    fewer = edited(path, tmp_path / "fewer", lambda tensors: tensors.pop("model.layers.1.mlp.experts.0.up_proj.weight"))
    with pytest.raises(ValueError, match="does not fit"):
        stream(fewer).observe(batches(), [SlotStats()], progress=False)


def test_a_checkpoint_that_only_says_it_is_quantised_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    for streamed in (True, False):
        with pytest.raises(ValueError, match="states that it is quantised with fp8"):
            moestro.open(tmp_path / "q", stream=streamed)


def test_nan_weights_name_layer_and_sample(checkpoint, tmp_path):
    def spoil(tensors):
        tensors["model.layers.1.self_attn.v_proj.weight"][0] = float("nan")

    view = stream(edited(checkpoint("qwen3_moe"), tmp_path / "nan", spoil))
    with pytest.raises(FloatingPointError, match=r"NaN router logits in layer 1 .* at sample 0, position 0"):
        view.observe(batches(), [SlotStats()], progress=False)


# Tied across decoder and encoder, or refused by moestro.open in memory as well.
NOT_STREAMED = {"diffusion_gemma": "ties", "inkling": "no known routing rule"}

NO_LOSS = {"openai_privacy_filter": "it classifies tokens"}


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.families())
def test_every_family_streams_or_is_refused(family, checkpoint, tmp_path):
    path, data = checkpoint(family), batches(family)
    if family in NOT_STREAMED:
        with pytest.raises(ValueError, match=NOT_STREAMED[family]):
            stream(path)
        return
    whole, streamed = moestro.open(path), stream(path)
    seen, expected = (view.observe(data, [SlotStats()], progress=False)[0] for view in (streamed, whole))
    assert_same_statistics(seen, expected)
    if family not in NO_LOSS:
        assert_same_loss(path, data)
    try:
        whole.keep_experts(halved(whole))
        whole.save(tmp_path / "whole")
    except ValueError as e:
        pytest.skip(f"observed; not saved in memory either: {e}")
    streamed.keep_experts(halved(streamed))
    streamed.save(tmp_path / "streamed")
    assert_same_weights(tmp_path / "streamed", tmp_path / "whole")
