"""Observing: what observers are told is what the model does, however the data are batched, padded or sharded.

Models are fp32; counts are exact, other values within FP32 of a reference made with plain hooks.
"""

import threading
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import moestro
import tiny
from moestro.data import TokenBatch
from moestro.fitting.evaluate import HeldoutLoss
from moestro.routing import Routing
from moestro.view import taps
from moestro.view.edit import Gain, Replace, SwitchOff
from moestro.view.events import MoEEvent, Tokens
from moestro.view.observe import LayerOutputs, RoutingTrace, SlotStatistics, SlotStats, read_trace
from tiny import FP32, LEARNED, Record, documents, logits_of, make, padded, slot_outputs, watching_experts

DOCS = documents(7, 3, 9, 5, 2, 6)


def same_statistics(one: SlotStatistics, other: SlotStatistics, *, rtol: float = 1e-4) -> None:
    assert one.tokens == other.tokens
    assert one.layers.keys() == other.layers.keys()
    for layer, slots in one.layers.items():
        assert torch.equal(slots.count, other.layers[layer].count)
        for name in ("gate_sum", "norm_sum", "gated_norm_sum"):
            assert_close(getattr(slots, name), getattr(other.layers[layer], name), rtol=rtol, atol=1e-6)


def same_record(one: dict[int, dict[str, Tensor]], other: dict[int, dict[str, Tensor]]) -> None:
    assert one.keys() == other.keys()
    for layer in one:
        for name, value in one[layer].items():
            scale = other[layer][name].abs().max().clamp_min(1)
            assert_close(
                value / scale, other[layer][name] / scale, **FP32, msg=lambda m, at=(layer, name): f"{at}: {m}"
            )


@pytest.fixture(scope="module", params=LEARNED)
def view(request: pytest.FixtureRequest) -> moestro.ExpertView:
    return moestro.open(make(request.param).model)


@pytest.fixture(scope="module")
def qwen() -> moestro.ExpertView:
    return moestro.open(make("qwen3_moe").model)


def alone(doc: int) -> dict[str, Any]:
    return {
        "input_ids": DOCS[doc][None],
        "sample": torch.tensor([doc]),
        "domain": torch.tensor([doc % 2]),
        "domains": ("even", "odd"),
    }


# --- the same, however the data come ---------------------------------------------------------------------------------


@given(owners=st.lists(st.integers(0, 2), min_size=len(DOCS), max_size=len(DOCS)))
def test_shards_merge_to_observing_at_once(qwen: moestro.ExpertView, owners: list[int]) -> None:
    def observed(docs: list[int]) -> list[Any]:
        observers = [SlotStats(), LayerOutputs(max_tokens=20), RoutingTrace(), Record("norms")]
        if docs:
            qwen.observe([alone(doc) for doc in docs], observers, progress=False)
        return observers

    first, *others = (observed([d for d, owner in enumerate(owners) if owner == shard]) for shard in range(3))
    for shard in others:
        for mine, theirs in zip(first, shard):
            mine.merge(theirs)
    stats, outputs, trace, record = (o.result() for o in first)
    all_stats, all_outputs, all_trace, all_record = (o.result() for o in observed(list(range(len(DOCS)))))
    same_statistics(stats, all_stats, rtol=1e-12)
    for name in ("even", "odd"):
        same_statistics(stats.domain(name), all_stats.domain(name), rtol=1e-12)
    for layer, (values, tokens) in outputs.items():
        assert_close(values, all_outputs[layer][0], **FP32)
        assert torch.equal(tokens.sample, all_outputs[layer][1].sample)
        assert len(tokens) == 20
    assert trace.collect().equals(all_trace.collect())
    same_record(record, all_record)


def test_merging_is_associative(qwen: moestro.ExpertView) -> None:
    def shards() -> list[SlotStats]:
        made = [SlotStats() for _ in range(3)]
        for shard, observer in enumerate(made):
            qwen.observe([alone(shard), alone(shard + 3)], [observer], progress=False)
        return made

    a, b, c = shards()
    a.merge(b)
    a.merge(c)
    d, e, f = shards()
    e.merge(f)
    d.merge(e)
    same_statistics(a.result(), d.result(), rtol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_size_and_padding_change_nothing(view: moestro.ExpertView, side: str) -> None:
    (one_by_one, stats) = view.observe([doc[None] for doc in DOCS], [Record("norms"), SlotStats()])
    for size in (2, 4):
        batches = [padded(DOCS[start : start + size], side) for start in range(0, len(DOCS), size)]
        (record, batched) = view.observe(batches, [Record("norms"), SlotStats()])
        same_record(record, one_by_one)
        same_statistics(batched, stats)
        assert sum(batched.tokens.values()) == sum(map(len, DOCS))


def test_every_token_knows_where_it_came_from(qwen: moestro.ExpertView) -> None:
    """Windows of documents, as `moestro.data` cuts them: positions go on where the window before ended."""
    windows = [(doc, start) for doc in range(len(DOCS)) for start in range(0, len(DOCS[doc]), 4)]
    batches = []
    for first in range(0, len(windows), 3):
        part = windows[first : first + 3]
        batch = padded([DOCS[doc][start : start + 4] for doc, start in part], "left")
        sample, start = (torch.tensor(column) for column in zip(*part))
        batches.append(TokenBatch(**batch, sample=sample, start=start, domain=sample % 2, domains=("even", "odd")))
    (record, stats) = qwen.observe(batches, [Record(), SlotStats()])
    for seen in record.values():
        assert seen["sample"].tolist() == [d for d, doc in enumerate(DOCS) for _ in doc]
        assert seen["position"].tolist() == [p for doc in DOCS for p in range(len(doc))]
        assert torch.equal(seen["id"], torch.cat(DOCS))
        assert torch.equal(seen["domain"], seen["sample"] % 2)
    assert stats.tokens == {name: sum(map(len, DOCS[i::2])) for i, name in enumerate(("even", "odd"))}


def test_domains_are_told_apart_by_name(qwen: moestro.ExpertView) -> None:
    """Batches may number the same domains differently."""
    one = padded(DOCS[:2], domain=torch.tensor([0, 1]), domains=("a", "b"), sample=torch.tensor([0, 1]))
    two = padded(DOCS[2:4], domain=torch.tensor([0, 1]), domains=("b", "c"), sample=torch.tensor([2, 3]))
    stats, outputs = qwen.observe([one, two], [SlotStats(), LayerOutputs()])
    assert stats.tokens == {"a": len(DOCS[0]), "b": len(DOCS[1]) + len(DOCS[2]), "c": len(DOCS[3])}
    for slots in stats.by_domain.values():
        assert slots.count.sum(dim=1).tolist() == [2 * stats.tokens[name] for name in stats.domains]
    for _, tokens in outputs.values():
        names = [tokens.domains[d] for d in tokens.domain]
        assert names == ["a"] * len(DOCS[0]) + ["b"] * (len(DOCS[1]) + len(DOCS[2])) + ["c"] * len(DOCS[3])


# --- what is told is what happened -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_events_hold_what_plain_hooks_see(view: moestro.ExpertView, side: str) -> None:
    inputs = padded(DOCS, side)
    real = inputs["attention_mask"].flatten().bool()
    with watching_experts(view) as calls:
        logits_of(view.model, inputs)
    (record,) = view.observe([inputs], [Record("norms", "maxima", "outputs")])
    for layer in view.layers:
        ((hidden, indices, weights),) = calls[layer.index]
        hidden, indices, weights = hidden[real], indices[real], weights[real]
        outputs, seen = slot_outputs(layer.experts, hidden, indices), record[layer.index]
        assert torch.equal(seen["indices"], indices)
        for name, expected in (
            ("hidden", hidden),
            ("weights", weights),
            ("outputs", outputs),
            ("norms", outputs.norm(dim=-1)),
            ("maxima", outputs.abs().amax(dim=-1)),
            ("combined", (outputs * weights[..., None]).sum(dim=1)),
        ):
            assert_close(seen[name], expected, **FP32)
        at_channel = seen["outputs"].gather(2, seen["channels"][..., None]).squeeze(2)
        assert torch.equal(at_channel.abs(), seen["maxima"])


def test_outputs_in_chunks_are_the_same(view: moestro.ExpertView, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = padded(DOCS, "left")  # the first chunks hold nothing but padding
    before = logits_of(view.model, inputs)
    (whole, stats) = view.observe([inputs], [Record("outputs", "norms"), SlotStats()])
    monkeypatch.setattr(taps, "OUTPUT_BYTES", 3 * 2 * 96 * 4)  # three tokens
    (chunked, chunked_stats) = view.observe([inputs], [Record("outputs", "norms"), SlotStats()])
    same_record(chunked, whole)
    same_statistics(chunked_stats, stats)
    with view.observing(Record("outputs")):
        assert_close(logits_of(view.model, inputs), before, **FP32)


def test_residual_is_the_stream_that_the_block_is_added_to(view: moestro.ExpertView) -> None:
    inputs, streams = padded(DOCS, "right"), {}
    real = inputs["attention_mask"].flatten().bool()
    hooks = []
    for layer in view.layers:
        norm = view.stack.layers[layer.index].post_attention_layernorm

        def keep(_: Any, args: tuple[Tensor], index: int = layer.index) -> None:
            streams[index] = args[0].flatten(0, 1)[real].clone()

        hooks.append(norm.register_forward_pre_hook(keep))
    (record, again) = view.observe([inputs], [Record("residual"), Record("residual", "outputs")])
    for hook in hooks:
        hook.remove()
    for layer in view.layers:
        assert torch.equal(record[layer.index]["residual"], streams[layer.index])
        assert torch.equal(again[layer.index]["residual"], streams[layer.index])


def test_unused_slots_are_not_counted(qwen: moestro.ExpertView) -> None:
    gone = {(layer.index, 3): 0.0 for layer in qwen.layers}
    with qwen.edits(Gain(gone)):
        (stats, record) = qwen.observe([padded(DOCS)], [SlotStats(), Record()])
    for layer in qwen.layers:
        slots, seen = stats.layers[layer.index], record[layer.index]
        assert (seen["indices"] == 3).any()
        assert slots.count[3] == slots.norm_sum[3] == 0
        assert slots.count.sum() == (seen["indices"] != 3).sum()


def test_sentinel_slots_are_not_counted() -> None:
    tokens = Tokens(*(torch.zeros(2, dtype=torch.long) for _ in range(4)), ("all",))
    weights, indices = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0, 4], [2, 1]])  # 4: no such expert
    routing = Routing(torch.zeros(2, 4), weights, indices)
    zeros = torch.zeros(2, 3)
    stats = SlotStats()
    stats.update(MoEEvent(0, 4, tokens, None, hidden=zeros, routing=routing, combined=zeros, norms=torch.ones(2, 2)))
    assert stats.result().layers[0].count.tolist() == [1, 0, 1, 0]


def test_what_a_hash_router_does_is_observed() -> None:
    small = make("deepseek_v4")
    view = moestro.open(small.model)
    inputs = small.inputs(B=3)
    with watching_experts(view) as calls:
        logits_of(small, inputs)
    (stats,) = view.observe([inputs], [SlotStats()])
    for layer in view.layers:
        ((_, indices, _),) = calls[layer.index]
        assert torch.equal(stats.layers[layer.index].count, indices.flatten().bincount(minlength=8).double())


# --- the model is left as it was -------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "moestro"])
def test_observing_does_not_change_what_the_model_does(implementation: str) -> None:
    small = make("qwen3_moe")
    small.model.set_experts_implementation(implementation)
    view, inputs = moestro.open(small.model), padded(DOCS, "left")
    before, hooks = logits_of(small, inputs), tiny.hooks_on(small.model)
    with view.observing(Record()):
        assert torch.equal(logits_of(small, inputs), before)
    with view.observing(Record("norms", "outputs", "residual")):
        assert_close(logits_of(small, inputs), before, **FP32)
    with pytest.raises(KeyboardInterrupt), view.observing(SlotStats()):
        raise KeyboardInterrupt
    assert small.model.config._experts_implementation == implementation
    assert tiny.hooks_on(small.model) == hooks
    assert torch.equal(logits_of(small, inputs), before)


def test_an_observer_that_fails_leaves_no_trace(qwen: moestro.ExpertView) -> None:
    class Failing(Record):
        def update(self, event: MoEEvent) -> None:
            raise ZeroDivisionError

    before, implementation = logits_of(qwen.model, padded(DOCS)), qwen.model.config._experts_implementation
    with pytest.raises(ZeroDivisionError):
        qwen.observe([padded(DOCS)], [Failing("outputs", "residual")])
    assert qwen.model.config._experts_implementation == implementation
    assert tiny.hooks_on(qwen.model) == 0
    assert torch.equal(logits_of(qwen.model, padded(DOCS)), before)
    qwen.observe([padded(DOCS)], [SlotStats()])


# --- generate, threads, several views --------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_events_during_generate(cache: dict[str, Any]) -> None:
    small = make("qwen3_moe")
    view, inputs, new = moestro.open(small.model), padded(DOCS[:2], "left"), 4
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    if cache.get("cache_implementation") == "static":
        options["disable_compile"] = True
    record, stats = Record("norms"), SlotStats()
    with view.observing(record, stats):
        out = small.model.generate(**inputs, **options, **cache)
    seen = record.result()[view.layers[0].index]
    width = inputs["input_ids"].shape[1]
    for row, doc in enumerate(DOCS[:2]):
        mine = seen["sample"] == row
        ids = torch.cat([doc, out[row, width:-1]])
        if "use_cache" in cache:  # every step runs over all tokens so far
            assert set(seen["position"][mine].tolist()) == set(range(len(ids)))
            assert int(mine.sum()) == sum(len(doc) + step for step in range(new))
        else:
            assert seen["position"][mine].tolist() == list(range(len(ids)))
            assert torch.equal(seen["id"][mine], ids)
    if "use_cache" not in cache:
        assert sum(stats.result().tokens.values()) == sum(map(len, DOCS[:2])) + 2 * (new - 1)


def test_what_another_thread_runs_is_observed(qwen: moestro.ExpertView) -> None:
    """Streamed generation runs in a thread of its own."""
    inputs, stats = padded(DOCS), SlotStats()
    with qwen.observing(stats):
        thread = threading.Thread(target=logits_of, args=(qwen.model, inputs))
        thread.start()
        thread.join()
    (expected,) = qwen.observe([inputs], [SlotStats()])
    same_statistics(stats.result(), expected)


def test_two_observations_at_once_are_refused(qwen: moestro.ExpertView) -> None:
    with qwen.observing(SlotStats()):
        with pytest.raises(RuntimeError, match="already running"):
            qwen.observe([padded(DOCS)], [SlotStats()])
        other = moestro.open(qwen.model)
        with pytest.raises(RuntimeError, match="already running"):
            other.observe([padded(DOCS)], [SlotStats()])
        logits_of(qwen.model, padded(DOCS))
    assert tiny.hooks_on(qwen.model) == 0
    qwen.observe([padded(DOCS)], [SlotStats()])


def test_observing_under_edits_tells_of_the_edited_model(qwen: moestro.ExpertView) -> None:
    off = {(layer.index, 0) for layer in qwen.layers}
    plain, _ = qwen.observe([padded(DOCS)], [SlotStats(), Record()])
    assert all(slots.count[0] > 0 for slots in plain.layers.values())
    with qwen.edits(SwitchOff(off)):
        edited, record = qwen.observe([padded(DOCS)], [SlotStats(), Record()])
    for layer in qwen.layers:
        assert edited.layers[layer.index].count[0] == 0
        assert torch.isneginf(record[layer.index]["logits"][:, 0]).all()


def test_replaced_outputs_are_observed(qwen: moestro.ExpertView) -> None:
    last = qwen.layers[-1].index
    replace = Replace({last: lambda hidden, indices, weights: 2 * hidden})
    (plain,) = qwen.observe([padded(DOCS)], [SlotStats()])
    with qwen.edits(replace):
        (record,) = qwen.observe([padded(DOCS)], [Record()])
        assert torch.equal(record[last]["combined"], 2 * record[last]["hidden"])
        (stats,) = qwen.observe([padded(DOCS)], [SlotStats()])  # of the experts that were replaced, all the same
    same_statistics(stats, plain)


# --- bundled observers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_per_file", [1, 200_000])
def test_routing_trace_comes_back_from_parquet(view: moestro.ExpertView, tmp_path: Path, rows_per_file: int) -> None:
    trace = RoutingTrace(tmp_path / "trace", rows_per_file=rows_per_file)
    batches = [padded(DOCS[:3]), padded(DOCS[3:], "left")]
    (lazy, record) = view.observe(batches, [trace, Record()])
    assert isinstance(lazy, pl.LazyFrame)
    assert len(list((tmp_path / "trace").iterdir())) == (2 * len(view.layers) if rows_per_file == 1 else 1)
    for frame in (lazy.collect(), read_trace(tmp_path / "trace").collect()):
        assert frame["layer"].unique().sort().to_list() == [layer.index for layer in view.layers]
        for layer in view.layers:
            rows, seen = frame.filter(pl.col("layer") == layer.index), record[layer.index]
            for name in ("sample", "position", "id"):
                assert rows[name].to_list() == seen[name].tolist()
            assert rows["domain"].unique().to_list() == ["all"]
            assert torch.equal(torch.tensor(rows["experts"].to_numpy()).long(), seen["indices"])
            assert torch.equal(torch.tensor(rows["weights"].to_numpy()), seen["weights"])
            assert torch.equal(torch.tensor(rows["logits"].to_numpy()), seen["logits"])


def test_routing_traces_are_compressed_with_zstd(qwen: moestro.ExpertView, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    qwen.observe([padded(DOCS)], [RoutingTrace(tmp_path, logits=False)])
    (file,) = tmp_path.iterdir()
    assert parquet.ParquetFile(file).metadata.row_group(0).column(0).compression == "ZSTD"
    assert "logits" not in pl.read_parquet(file).columns


def test_a_routing_trace_is_never_written_over_another(qwen: moestro.ExpertView, tmp_path: Path) -> None:
    qwen.observe([padded(DOCS)], [RoutingTrace(tmp_path)])
    with pytest.raises(FileExistsError, match="already holds a trace"):
        RoutingTrace(tmp_path)
    with pytest.raises(FileNotFoundError, match="no routing trace"):
        read_trace(tmp_path / "elsewhere")


def test_layers_of_different_shapes_are_traced_apart(tmp_path: Path) -> None:
    view = moestro.open(make("qwen3_moe").model)
    view.keep_experts({1: [0, 1, 2, 3]})
    with pytest.raises(ValueError, match=r"different shapes.*choose slots= and classes="):
        view.observe([padded(DOCS)], [RoutingTrace(tmp_path)])
    for classes, layer in ((4, 1), (8, 2)):
        frame = read_trace(tmp_path, classes=classes).collect()
        assert frame["layer"].unique().to_list() == [layer]
        assert len(frame) == sum(map(len, DOCS))


def test_layer_outputs_are_limited_and_chosen(qwen: moestro.ExpertView) -> None:
    batches, total = [padded(DOCS[:3]), padded(DOCS[3:])], sum(map(len, DOCS))
    for limit in (5, 21, total, 10 * total):
        (outputs, record) = qwen.observe(batches, [LayerOutputs([1], max_tokens=limit), Record()])
        assert outputs.keys() == {1}
        values, tokens = outputs[1]
        assert len(values) == len(tokens) == min(limit, total)
        assert torch.equal(values, record[1]["combined"][:limit])
        assert torch.equal(tokens.id, record[1]["id"][:limit])


def test_bf16_is_observed() -> None:
    small = tiny.build("qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=3)
    view = moestro.open(small.model)
    (stats, trace, record) = view.observe([padded(DOCS)], [SlotStats(), RoutingTrace(), Record("norms", "outputs")])
    for layer in view.layers:
        seen = record[layer.index]
        assert seen["outputs"].dtype == torch.bfloat16
        assert_close(seen["norms"], seen["outputs"].float().norm(dim=-1), **tiny.BF16)
        assert stats.layers[layer.index].count.sum() == 2 * sum(map(len, DOCS))
    assert trace.collect()["weights"].dtype == pl.Array(pl.Float32, 2)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", [SlotStats, Record])
def test_nan_names_the_layer_and_the_sample(observer: type) -> None:
    small = make("qwen3_moe")
    view = moestro.open(small.model)
    poison = 39  # a word that only sample 4 has
    small.model.get_input_embeddings().weight.data[poison] = float("nan")
    docs = [doc.clone() for doc in DOCS]
    docs[4][1] = poison
    view.observe([padded(docs[:4])], [observer()])
    with pytest.raises(FloatingPointError, match=r"layer 1 \(model\.layers\.1\.mlp\) at sample 4, position "):
        view.observe([padded(docs[:3]), padded(docs[3:], "left")], [observer()])
    assert tiny.hooks_on(small.model) == 0


def test_nan_in_padding_does_not_matter(qwen: moestro.ExpertView) -> None:
    inputs = padded(DOCS)
    (expected,) = qwen.observe([inputs], [SlotStats()])
    padding = ~inputs["attention_mask"].flatten().bool()[:, None]
    hook = qwen.layer(1).router.register_forward_hook(
        lambda _, args, out: (out[0].masked_fill(padding, float("nan")), *out[1:])
    )
    try:
        (stats,) = qwen.observe([inputs], [SlotStats()])
    finally:
        hook.remove()
    same_statistics(stats, expected)


@pytest.mark.parametrize(
    "data",
    [
        [],
        [torch.zeros(0, 5, dtype=torch.long)],
        [torch.zeros(2, 0, dtype=torch.long)],
        [{"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}],
        iter([]),
    ],
)
def test_data_without_a_token_are_refused(qwen: moestro.ExpertView, data: Any) -> None:
    with pytest.raises(ValueError, match="no token"):
        qwen.observe(data, [SlotStats()])


def test_impossible_requests_are_refused(qwen: moestro.ExpertView) -> None:
    class Unknown(Record):
        def update(self, event: MoEEvent) -> None:
            raise AssertionError("nothing may run")

    with pytest.raises(ValueError, match=r"attention.*known needs are.*norms.*outputs.*residual"):
        qwen.observe([padded(DOCS)], [Unknown("attention")])
    with pytest.raises(TypeError, match="cannot observe a str"):
        qwen.observe(["a text"], [Unknown()])
    with pytest.raises(ValueError, match=r"\(7,\).*\[B, T\]"):
        qwen.observe([DOCS[0]], [Unknown()])
    with pytest.raises(ValueError, match=r"'norms' was not asked for|norms was not asked for"):
        qwen.observe([padded(DOCS)], [NeedsTooLittle()])
    with pytest.raises(ValueError, match="no domain 'missing'"):
        qwen.observe([padded(DOCS)], [SlotStats()])[0].domain("missing")


class NeedsTooLittle(SlotStats):
    needs = frozenset()


# --- what the language model predicts --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_held_out_loss_leaves_padding_out_and_tells_domains_apart(qwen: moestro.ExpertView, side: str) -> None:
    (one_by_one,) = qwen.observe([alone(doc) for doc in range(len(DOCS))], [HeldoutLoss()], progress=False)
    domains = {"domain": torch.tensor([doc % 2 for doc in range(len(DOCS))]), "domains": ("even", "odd")}
    (batched,) = qwen.observe([padded(DOCS, side, **domains)], [HeldoutLoss()], progress=False)
    assert {name: count for name, (_, count) in batched.items()} == {"even": 6 + 8 + 1, "odd": 2 + 4 + 5}
    assert batched.keys() == one_by_one.keys()
    for name, found in batched.items():
        assert found == pytest.approx(one_by_one[name], rel=1e-5)


def test_held_out_loss_merges_and_needs_two_tokens(qwen: moestro.ExpertView) -> None:
    parts = [HeldoutLoss() for _ in DOCS]
    for doc, part in enumerate(parts):
        qwen.observe([alone(doc)], [part], progress=False)
    for part in parts[1:]:
        parts[0].merge(part)
    (expected,) = qwen.observe([alone(doc) for doc in range(len(DOCS))], [HeldoutLoss()], progress=False)
    assert parts[0].result() == expected
    with pytest.raises(ValueError, match="not one token of 'all' is predicted"):
        qwen.observe([DOCS[0][None, :1]], [HeldoutLoss()], progress=False)


def test_held_out_loss_that_is_not_finite_is_an_error() -> None:
    small = make("qwen3_moe")
    small.model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss on 'all' is nan"):
        moestro.open(small.model).observe([padded(DOCS)], [HeldoutLoss()], progress=False)


def test_logits_of_a_model_inside_another_module(qwen: moestro.ExpertView) -> None:
    class Agent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = qwen.model

    (inside,) = moestro.open(Agent()).observe([padded(DOCS)], [HeldoutLoss()], progress=False)
    assert (inside,) == tuple(qwen.observe([padded(DOCS)], [HeldoutLoss()], progress=False))
