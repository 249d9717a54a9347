"""What is in force belongs to the model: any view, thread, copy, compiled or recomputed layer sees one truth.

Models are tiny and fp32; equalities are exact unless a tolerance is named.
"""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.testing import assert_close

import moestro
from families.tiny import build
from moestro import Edit, Gain, LogitBias, Replace, Reselect, SwitchOff
from moestro.recipe import Recipe, keep
from moestro.routing import Routing
from moestro.view.heads import HeadMask, HeadMeans
from moestro.view.observe import ExpertCounts, RoutingTrace, SlotStats
from tiny import FP32, Record, documents, hooks_on, logits_of, make, padded

IDS = {"input_ids": torch.arange(40, 52)[None]}
OFF = SwitchOff({(1, 0), (1, 1), (2, 0), (2, 3)})


@pytest.fixture
def qwen() -> moestro.ExpertView:
    return moestro.open(make("qwen3_moe").model)


def edited_logits(view: moestro.ExpertView, *edits: Edit) -> Tensor:
    with view.edits(*edits):
        return logits_of(view.model, IDS)


# --- blocks that overlap ---------------------------------------------------------------------------------------------


def test_blocks_of_generators_end_in_any_order(qwen: moestro.ExpertView) -> None:
    def stream(*edits: Edit) -> Iterator[None]:
        with qwen.edits(*edits):
            yield
            yield

    plain = logits_of(qwen.model, IDS)
    second = edited_logits(qwen, SwitchOff({(2, 2)}))
    a, b = stream(OFF), stream(SwitchOff({(2, 2)}))
    next(a), next(b)
    list(a)
    assert torch.equal(logits_of(qwen.model, IDS), second)
    list(b)
    assert torch.equal(logits_of(qwen.model, IDS), plain)
    assert not hooks_on(qwen.model)
    assert torch.equal(edited_logits(qwen, Gain({(1, 0): 1.0})), plain)


def test_blocks_of_threads_leave_nothing_behind(qwen: moestro.ExpertView) -> None:
    plain, barrier = logits_of(qwen.model, IDS), threading.Barrier(4)

    def work(number: int) -> None:
        view = moestro.open(qwen.model)
        barrier.wait()
        for turn in range(5):
            with view.edits(SwitchOff({(1, (number + turn) % 8)})):
                logits_of(view.model, IDS)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not hooks_on(qwen.model)
    assert torch.equal(logits_of(qwen.model, IDS), plain)


def test_an_observation_does_not_see_what_other_threads_run(qwen: moestro.ExpertView) -> None:
    alone, heads = qwen.observe([IDS], [ExpertCounts(), HeadMeans()])
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            logits_of(qwen.model, {"input_ids": torch.arange(3, 9)[None]})

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        found = [qwen.observe([IDS], [ExpertCounts(), HeadMeans()]) for _ in range(5)]
    finally:
        stop.set()
        thread.join()
    assert all(torch.equal(counts[layer], alone[layer]) for counts, _ in found for layer in alone)
    assert all(torch.equal(means[layer], heads[layer]) for _, means in found for layer in heads)


# --- several views and copies ----------------------------------------------------------------------------------------


def test_all_views_of_a_model_see_the_same(qwen: moestro.ExpertView) -> None:
    inner = moestro.open(qwen.model.model)
    edited = edited_logits(qwen, OFF)
    with inner.edits(OFF):
        assert torch.equal(logits_of(qwen.model, IDS), edited)
        with pytest.raises(RuntimeError, match="in use"):
            qwen.keep_experts({1: range(4), 2: range(4)})
        (seen,) = qwen.observe([IDS], [ExpertCounts()])
    assert not seen[1][:, :2].any()
    qwen.set_top_k(3)
    assert [layer.top_k for layer in inner.layers] == [3, 3]


def test_opening_under_an_edit_does_not_learn_the_edit(qwen: moestro.ExpertView) -> None:
    with qwen.edits(Reselect(lambda _, z: -3 * z), HeadMask({(1, 0)})):
        other = moestro.open(qwen.model)
        assert len(other.heads) == 3
    assert [layer.rule.describe() for layer in other.layers] == [layer.rule.describe() for layer in qwen.layers]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
def test_a_copy_starts_clean_and_lives_alone(qwen: moestro.ExpertView, copied: Any) -> None:
    plain, edited = logits_of(qwen.model, IDS), edited_logits(qwen, OFF)
    with qwen.edits(OFF, HeadMask({(1, 0)}), SwitchOff({(1, 5)}, rows=[0])):
        twin = copied(qwen)
    assert torch.equal(logits_of(twin.model, IDS), plain)
    assert torch.equal(edited_logits(twin, OFF), edited)
    twin.keep_experts({1: range(4), 2: range(4)})
    assert torch.equal(logits_of(qwen.model, IDS), plain)
    assert qwen.layers[0].num_experts == 8
    generated = twin.model.generate(**IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 14)


def test_a_deep_copy_has_no_hook_and_the_models_own_backend(qwen: moestro.ExpertView) -> None:
    backend = qwen.model.config._experts_implementation
    with qwen.edits(OFF), qwen.observing(SlotStats(), Record("residual")):
        twin = copy.deepcopy(qwen.model)
    assert not hooks_on(twin)
    assert twin.config._experts_implementation == backend


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
def test_a_copy_of_a_streamed_view_is_opened_again(tmp_path: Any, copied: Any) -> None:
    moestro.open(make("qwen3_moe").model).save(tmp_path / "whole")
    view = moestro.open(tmp_path / "whole", stream=True)
    view.keep_experts({1: [7, 0, 2], 2: [1, 2, 3]})
    twin = copied(view)
    del view
    twin.save(tmp_path / "cut")
    again = moestro.open(tmp_path / "cut")
    assert again.original_ids == twin.original_ids == {1: [7, 0, 2], 2: [1, 2, 3]}
    twin.set_top_k(1)
    assert [layer.top_k for layer in again.layers] == [2, 2]


# --- compiled models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["layers", "model", "in place"])
def test_edits_and_observers_act_in_compiled_models(qwen: moestro.ExpertView, how: str) -> None:
    run: Any = qwen.model
    plain, edited = logits_of(run, IDS), edited_logits(qwen, OFF)
    if how == "layers":
        for layer in run.model.layers:
            layer.compile(backend="eager")
    elif how == "model":
        run = torch.compile(run, backend="eager")
    else:
        run.compile(backend="eager")
    assert_close(logits_of(run, IDS), plain, **FP32)
    with qwen.edits(OFF):
        assert_close(logits_of(run, IDS), edited, **FP32)
    with qwen.observing(counts := ExpertCounts()):
        logits_of(run, IDS)
    assert {layer: int(c.sum()) for layer, c in counts.result().items()} == {1: 24, 2: 24}
    assert_close(logits_of(run, IDS), plain, **FP32)
    assert edited_logits(moestro.open(run), OFF).equal(edited)


def test_what_is_compiled_inside_a_block_does_not_keep_the_edit(qwen: moestro.ExpertView) -> None:
    plain = logits_of(qwen.model, IDS)
    with qwen.edits(OFF):
        run = torch.compile(qwen.model, backend="eager")
        logits_of(run, IDS)
    assert_close(logits_of(run, IDS), plain, **FP32)


# --- layers that gradient checkpointing runs again -------------------------------------------------------------------

CHECKPOINTING = [{"use_reentrant": True}, {"use_reentrant": False}]
FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss"]


def gradients(
    view: moestro.ExpertView, options: dict[str, bool] | None, *edits: Any, late: bool, seen: Any = ()
) -> Tensor:
    """Of the loss under the edits; `late`: the backward pass runs after the block."""
    model = copy.deepcopy(view.model).train()
    if options is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    own, hooks = moestro.open(model), hooks_on(model)
    with own.edits(*edits), own.observing(*seen):
        loss = model(**IDS, labels=IDS["input_ids"], use_cache=False).loss
        if not late:
            loss.backward()
    if late:
        loss.backward()
    assert hooks_on(model) == hooks
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("options", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_holds_for_the_recomputation(family: str, options: dict[str, bool], late: bool) -> None:
    view = moestro.open(make(family).model)
    first = view.layers[0].index
    edits = [SwitchOff({(first, 0)}), Gain({(2, 1): 0.5}, rows=[0]), HeadMask({(1, 0)})]
    plain = gradients(view, None, *edits, late=False)
    assert_close(gradients(view, options, *edits, late=late), plain, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(gradients(view, options, late=late), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("options", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_observers_count_every_token_once(family: str, options: dict[str, bool], late: bool) -> None:
    view = moestro.open(make(family).model)
    results = []
    for how in (None, options):
        seen = SlotStats(), Record("outputs", "residual"), HeadMeans()
        gradients(view, how, late=late, seen=seen)
        results.append([observer.result() for observer in seen])
    (stats, record, means), (again, recorded, meant) = results
    for layer, slots in stats.layers.items():
        assert torch.equal(again.layers[layer].count, slots.count)
        assert slots.count.sum() == 24
        assert_close(recorded[layer]["outputs"], record[layer]["outputs"], **FP32)
    for layer, mean in means.items():
        assert_close(meant[layer], mean, **FP32)


@pytest.mark.parametrize(
    "edit", [OFF, Gain({(1, 1): 0.5}), HeadMask({(1, 0)}), Replace({1: lambda hidden, indices, weights: 0 * hidden})]
)
@pytest.mark.parametrize("options", CHECKPOINTING)
def test_an_edit_under_a_checkpoint_made_by_hand_is_refused(
    qwen: moestro.ExpertView, options: dict[str, bool], edit: Any
) -> None:
    model = qwen.model.train()
    embedded = model.get_input_embeddings()(IDS["input_ids"])

    def run(embeds: Tensor) -> Tensor:
        return model(inputs_embeds=embeds, use_cache=False).logits

    with qwen.edits(edit), pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        torch.utils.checkpoint.checkpoint(run, embedded, **options)
    torch.utils.checkpoint.checkpoint(run, embedded, **options).sum().backward()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("options", CHECKPOINTING)
def test_a_learned_bias_has_the_same_gradient_under_checkpointing(options: dict[str, bool]) -> None:
    def gradient(options: dict[str, bool] | None) -> Tensor:
        view = moestro.open(make("qwen3_moe").model)
        bias = {1: torch.zeros(8, requires_grad=True), 2: torch.zeros(8, requires_grad=True)}
        model = view.model.train()
        if options is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        with view.edits(LogitBias(bias)):
            loss = model(**IDS, labels=IDS["input_ids"], use_cache=False).loss
        loss.backward()
        return torch.stack([b.grad for b in bias.values()])

    assert_close(gradient(options), gradient(None), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_in_torchs_checkpoint_wrapper_are_run_again_as_they_were(reentrant: bool, late: bool) -> None:
    def gradient(wrapped: bool) -> tuple[Tensor, int]:
        view, counts = moestro.open(make("qwen3_moe").model), SlotStats()
        model = view.model.train()
        if wrapped:
            layer = type(model.model.layers[0])
            kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
            wrap = partial(checkpoint_wrapper, checkpoint_impl=kind)
            apply_activation_checkpointing(
                model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: isinstance(module, layer)
            )
        embedded = model.get_input_embeddings()(IDS["input_ids"]).detach().requires_grad_()
        with view.edits(OFF), view.observing(counts):
            loss = model(inputs_embeds=embedded, use_cache=False).logits.square().mean()
            if not late:
                loss.backward()
        if late:
            loss.backward()
        return view.layers[0].experts.down_proj.grad, int(counts.result().layers[1].count.sum())

    (expected, once), (found, counted) = gradient(False), gradient(True)
    assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert counted == once == 24


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("options", CHECKPOINTING)
def test_a_pass_before_an_observation_is_run_again_on_its_own_backend(
    qwen: moestro.ExpertView, options: dict[str, bool]
) -> None:
    model = qwen.model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    loss = model(**IDS, labels=IDS["input_ids"], use_cache=False).loss
    with qwen.observing(stats := SlotStats()):
        loss.backward()
    assert not stats.result().layers


# --- layers that share modules ---------------------------------------------------------------------------------------


def test_layers_that_share_their_experts_are_both_found() -> None:
    model = make("qwen3_moe").model
    model.model.layers[2].mlp.experts = model.model.layers[1].mlp.experts
    view = moestro.open(model)
    assert [layer.index for layer in view.layers] == [1, 2]
    (record,) = view.observe([IDS], [Record("norms")])
    alone = copy.deepcopy(model)
    alone.model.layers[2].mlp.experts = copy.deepcopy(alone.model.layers[1].mlp.experts)
    (expected,) = moestro.open(alone).observe([IDS], [Record("norms")])
    for layer in (1, 2):
        assert torch.equal(record[layer]["indices"], expected[layer]["indices"])
        assert_close(record[layer]["norms"], expected[layer]["norms"], **FP32)
    with pytest.raises(ValueError, match="share their experts"):
        view.keep_experts({1: range(4)})


def test_layers_that_share_the_whole_block_take_turns() -> None:
    model = make("qwen3_moe").model
    model.model.layers[2].mlp = model.model.layers[1].mlp
    view = moestro.open(model)
    plain = logits_of(model, IDS)
    (record,) = view.observe([IDS], [Record("norms")])
    assert not torch.equal(record[1]["hidden"], record[2]["hidden"])
    with view.edits(SwitchOff({(2, int(record[2]["indices"][0, 0]))})):
        (edited,) = view.observe([IDS], [Record()])
    assert torch.equal(edited[1]["indices"], record[1]["indices"])
    assert not torch.equal(edited[2]["indices"], record[2]["indices"])
    assert torch.equal(logits_of(model, IDS), plain)


# --- several stacks --------------------------------------------------------------------------------------------------


def test_stacks_that_number_alike_are_called_by_name() -> None:
    small = build("ernie4_5_vl_moe")
    with pytest.warns(UserWarning, match="vision_moe"):
        alone = moestro.open(small.model)
    both = moestro.open(small.model, part="all")
    text = [layer.name for layer in alone.layers]
    assert {layer.name for layer in both.layers} > set(text)
    with pytest.raises(ValueError, match="give the name"):
        both.layer(alone.layers[0].index)
    ids = {"input_ids": small.inputs(1, 9)["input_ids"]}
    expert = (alone.layers[0].index, 0)
    expected = None
    with alone.edits(SwitchOff({expert})):
        expected = logits_of(small.model, ids)
    assert not torch.equal(expected, logits_of(small.model, ids))
    for view in (alone, both):
        with view.edits(SwitchOff({(text[0], 0)})):
            assert torch.equal(logits_of(small.model, ids), expected)


def test_stacks_with_one_stated_number_are_cut_together(tmp_path: Any) -> None:
    model = build("ernie4_5_vl_moe").model
    with pytest.warns(UserWarning, match="left"):
        alone = moestro.open(model)
    with pytest.raises(ValueError, match="part='all'"):
        alone.check(Recipe((keep({layer.name: range(4) for layer in alone.layers}),)))
    both = moestro.open(model, part="all")
    both.keep_experts({layer.name: [7, 0, 2, 3] for layer in both.layers})
    both.save(tmp_path / "cut")
    again = moestro.open(tmp_path / "cut", part="all")
    assert again.original_ids == {layer.name: [7, 0, 2, 3] for layer in both.layers}
    assert_close(logits_of(again.model, IDS), logits_of(model, IDS), **FP32)


# --- rows and positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
def test_numbered_rows_are_rows_of_the_callers_batch(qwen: moestro.ExpertView, beams: dict[str, Any]) -> None:
    ids = torch.stack([torch.arange(40, 48), torch.arange(60, 68)])
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0} | beams
    out = []
    for rows in ([1], [False, True]):
        torch.manual_seed(0)
        with qwen.edits(SwitchOff({(1, 0), (1, 1), (2, 3)}, rows=rows), HeadMask({(1, 0)}, rows=rows)):
            out.append(qwen.model.generate(input_ids=ids, **options))
    assert torch.equal(*out)
    with pytest.raises(ValueError, match="has 2 rows"), qwen.edits(Gain({(1, 0): 0.0}, rows=[3])):
        qwen.model.generate(input_ids=ids, **options)
    six = {"input_ids": ids.repeat(3, 1)}
    with qwen.edits(Gain({(1, 0): 0.0, (1, 1): 0.0}, rows=[5])):
        changed = (logits_of(qwen.model, six) - logits_of(moestro.open(copy.deepcopy(qwen.model)).model, six)).abs()
    assert {"generate", "_expand_inputs_for_generation"}.isdisjoint(vars(qwen.model))
    assert changed[:5].amax() < 1e-4
    assert changed[5].amax() > 1e-3


class Positions:
    needs: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, event: Any) -> None:
        if event.layer == 0:
            self.seen.append(torch.stack([event.tokens.sample, event.tokens.position], dim=1))

    def merge(self, other: Any) -> None: ...

    def result(self) -> Any:
        return [t.tolist() for t in self.seen]


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("cache", [None, "static"])
def test_positions_count_a_rows_own_tokens(cache: str | None, window: int | None, side: str) -> None:
    view = moestro.open(build("mixtral", num_hidden_layers=2, sliding_window=window).model)
    docs = documents(9, 9) if side == "none" else documents(9, 5)
    inputs = {"input_ids": torch.stack(docs)} if side == "none" else padded(docs, "left")
    with view.observing(seen := Positions()):
        view.model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, cache_implementation=cache
        )
    first, *steps = seen.result()
    lengths = [len(doc) for doc in docs]
    assert first == [[row, p] for row, length in enumerate(lengths) for p in range(length)]
    assert steps == [[[row, length + step] for row, length in enumerate(lengths)] for step in range(3)]


# --- what broke is told ----------------------------------------------------------------------------------------------


class Misroute(Edit):
    def routing(self, layer: int, routing: Routing) -> Routing:
        return routing._replace(indices=routing.indices + 8)


def test_an_index_beyond_the_unused_one_is_an_error(qwen: moestro.ExpertView) -> None:
    with pytest.raises(ValueError, match="marks a slot as unused"), qwen.edits(Misroute()):
        logits_of(qwen.model, IDS)
    experts = qwen.layers[0].experts
    qwen.model.set_experts_implementation("moestro")
    for tokens in (1, 40):  # one slot after the other, and in groups
        indices = torch.full((tokens, 2), 9)
        with pytest.raises(ValueError, match="names expert 9"):
            experts(torch.zeros(tokens, 32), indices, torch.ones(tokens, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_stops_with_its_place(qwen: moestro.ExpertView, value: float) -> None:
    (record,) = qwen.observe([IDS], [Record()])
    used = int(record[2]["indices"][3, 0])
    with torch.no_grad():
        qwen.layers[1].experts.down_proj[used] = value
    first = int((record[2]["indices"] == used).any(dim=1).nonzero()[0])
    with pytest.raises(FloatingPointError, match=rf"expert {used} .* layer 2 .* sample 0, position {first}"):
        qwen.observe([IDS], [SlotStats()])


def test_a_trace_of_small_events_is_that_of_one(qwen: moestro.ExpertView, tmp_path: Any) -> None:
    docs = documents(7, 3, 9)
    traces = []
    for name, batches in (("one", [padded(docs)]), ("many", [doc[None] for doc in docs])):
        (trace,) = qwen.observe(batches, [RoutingTrace(tmp_path / name, rows_per_file=10)])
        traces.append(trace.collect().drop("logits", "weights"))
    assert traces[0].equals(traces[1])


# --- what else may happen around a block ------------------------------------------------------------------------------


def test_a_model_that_was_edited_and_observed_is_freed() -> None:
    view = moestro.open(make("qwen3_moe").model)
    with view.edits(OFF), view.observing(Record("norms", "residual")):
        view.model(**IDS)
    gone = weakref.ref(view.layers[0].experts.down_proj)
    del view
    gc.collect()
    assert gone() is None


def test_blocks_that_tell_the_batch_end_in_any_order(qwen: moestro.ExpertView) -> None:
    first, second = qwen.reading(IDS), qwen.reading({"input_ids": torch.zeros(3, 2, dtype=torch.long)})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert qwen.batch is not None
    assert qwen.batch.shape == (3, 2)
    second.__exit__(None, None, None)
    assert qwen.batch is None


def test_a_pickle_of_an_observed_model_computes_as_the_model_itself_does(qwen: moestro.ExpertView) -> None:
    plain, backend = logits_of(qwen.model, IDS), qwen.model.config._experts_implementation
    with qwen.observing(Record("norms")):
        copies = copy.deepcopy(qwen.model), pickle.loads(pickle.dumps(qwen.model)), copy.deepcopy(qwen.layers[0].block)
    for model in copies[:2]:
        assert model.config._experts_implementation == backend
        assert torch.equal(logits_of(model, IDS), plain)
    assert copies[2].experts.config._experts_implementation == backend


def test_heads_stay_edited_when_attention_is_computed_otherwise(qwen: moestro.ExpertView) -> None:
    with qwen.edits(HeadMask({(1, 0), (1, 2)})):
        before = logits_of(qwen.model, IDS)
        qwen.model.set_attn_implementation("eager")
        assert_close(logits_of(qwen.model, IDS), before, **FP32)
    qwen.model.set_attn_implementation("sdpa")


def test_a_backend_that_shows_no_slots_is_not_passed_over(qwen: moestro.ExpertView) -> None:
    with qwen.observing(Record("norms")):
        qwen.model.set_experts_implementation("eager")
        with pytest.raises(RuntimeError, match="past the observers"):
            qwen.model(**IDS)
    assert not hooks_on(qwen.model)


def test_outputs_are_observed_under_autocast(qwen: moestro.ExpertView) -> None:
    record = Record("outputs", "norms", "maxima")
    with torch.autocast("cpu", torch.bfloat16), qwen.observing(record):
        qwen.model(**IDS)
    outputs = record.result()[1]["outputs"]
    assert_close(outputs.norm(dim=-1), record.result()[1]["norms"], rtol=1e-2, atol=1e-2)


def test_an_infinite_router_logit_stops_with_its_place() -> None:
    view = moestro.open(make("gpt_oss").model)
    with torch.no_grad():
        view.layers[-1].router.bias[3] = float("inf")
    with pytest.raises(FloatingPointError, match=r"gate weights that are not finite in layer 2 .* at sample 0"):
        view.observe([IDS["input_ids"]], [SlotStats()], progress=False)
