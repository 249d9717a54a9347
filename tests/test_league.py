"""The league: rows that are kept, entries from anywhere, equal active parameters, one table."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from moestro.cli import app
from moestro.data.rules import chains, ciphers, permutations
from moestro.evidence import league_command, training
from moestro.evidence.league import measure, page, run, tasks
from moestro.evidence.league.entries import ENTRIES, MEASURES, SIZE
from moestro.layers.routers import ROUTERS, Router
from moestro.models.lm import MoELMForCausalLM
from moestro.routing import Routing, RoutingContext

DOCS = Path(__file__).parent.parent / "docs"
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
TINY = run.Settings(steps=2, tokens=64, heldout_rows=1, size={**SIZE, **SMALL})
MEASURED = ["entry", "task", "seed", "loss", "loss_by_domain", "violation", "information", "active", "config"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Two tiny tasks, tiny models, an empty directory, and tables that are as before afterwards."""
    for table in (ENTRIES, MEASURES, ROUTERS):
        for name, value in list(table.items()):
            monkeypatch.setitem(table, name, value)
    before = {id(table): set(table) for table in (ENTRIES, MEASURES, ROUTERS)}
    tiny = dict(rows=32, heldout=8)
    small_chains = tasks._generated(partial(chains, length=16, domains=4, alphabet=8), **tiny)
    small_ciphers = tasks._generated(partial(ciphers, words=2, word=3, domains=4, alphabet=8), **tiny)
    monkeypatch.delitem(tasks.TASKS, "sample")
    monkeypatch.setitem(tasks.TASKS, "chains", lambda: small_chains)
    monkeypatch.setitem(tasks.TASKS, "ciphers", lambda: small_ciphers)
    monkeypatch.setattr(run, "QUICK", TINY)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(page, "in_checkout", lambda: False)
    monkeypatch.chdir(tmp_path)
    yield
    for table in (ENTRIES, MEASURES, ROUTERS):
        for name in set(table) - before[id(table)]:
            del table[name]


def league(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["league", "--quick", *arguments], catch_exceptions=False)
    return result.output


# Equal conditions


def test_all_entries_have_the_same_active_parameters() -> None:
    counted = run.budgets(ENTRIES, run.Settings())
    assert len(counted) == len(ENTRIES) >= 8
    active = [p.active for p in counted.values()]
    assert max(active) / min(active) < 1.02
    assert counted["dense"].router == 0 < counted["top_k"].router


def test_a_token_passes_the_experts_that_it_chooses() -> None:
    model = run.build("top_k", TINY)
    layer = model.model.layers[0].mlp
    expert = layer.experts.gate_up_proj[0].numel() + layer.experts.down_proj[0].numel()
    counted = measure.parameters(model)
    everything = sum(p.numel() for p in model.parameters())
    idle = 2 * (16 - 2) * expert
    assert counted.active == everything - counted.embedding - counted.router - idle
    assert (counted.total, counted.slot, counted.top_k) == (everything, 2 * expert, 2)


def test_experts_that_layers_share_are_active_in_each() -> None:
    model = run.build("top_k", TINY)
    alone = measure.parameters(model)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    shared = measure.parameters(model)
    assert (shared.active, shared.slot) == (alone.active, alone.slot)
    assert shared.total < alone.total


def test_unequal_active_parameters_are_refused_before_any_run(tmp_path: Path) -> None:
    ENTRIES["wide"] = dict(router="top_k", moe_intermediate_size=24)
    with pytest.raises(ValueError, match=r"active parameters must be within 1% of .*wide .*\(\+\d+\.\d%\)"):
        run.play(tmp_path / "t.parquet", settings=TINY, entries=["dense", "wide"])
    assert not (tmp_path / "t.parquet").exists()


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(ValueError, match="no entry 'topk'; there are: dense, switch, top_k"):
        run.play(path, settings=TINY, entries=["topk"])
    with pytest.raises(ValueError, match="no task 'sample'; there are: chains, ciphers"):
        run.play(path, settings=TINY, tasks=["sample"])


# Rows that are kept


def test_a_second_call_continues_and_gives_the_same_table(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.parquet", tmp_path / "parts.parquet"
    options = dict(settings=TINY, entries=["dense", "top_k"], seeds=2)
    run.play(whole, **options)

    class Stop(Exception):
        pass

    def stop(now: run.Run, number: int, total: int) -> None:
        if number == 3:
            raise Stop

    with pytest.raises(Stop):
        run.play(parts, on_start=stop, **options)
    kept = run.read(parts)
    assert len(kept) == 3
    started: list[int] = []
    run.play(parts, on_start=lambda _, number, total: started.append(total), **options)
    assert started == [5] * 5
    assert_frame_equal(run.read(whole).select(MEASURED), run.read(parts).select(MEASURED))
    assert_frame_equal(run.read(parts)[:3], kept)
    assert run.read(whole)["seed"].to_list() == [0] * 4 + [1] * 4


def test_rows_of_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    run.play(path, settings=TINY, entries=["dense"], seeds=1)
    other = replace(TINY, steps=3, size={**TINY.size, "head_dim": 4})
    with pytest.raises(ValueError, match=r"has rows with size.head_dim=8 where it is 4 now, steps=2 where it is 3 now"):
        run.play(path, settings=other, entries=["dense"], seeds=1)


def test_a_changed_entry_is_refused_until_it_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    options = dict(settings=TINY, entries=["dense", "top_k"], tasks=["chains"], seeds=1)
    run.play(path, **options)
    ENTRIES["top_k"] = dict(router="top_k", router_losses={})
    with pytest.raises(
        ValueError, match=r"rows of 'top_k' with router_losses=None where it is \{\} now.*--again top_k"
    ):
        run.play(path, **options)
    table = run.play(path, again=["top_k"], **options)
    assert table["entry"].to_list() == ["dense", "top_k"]
    assert json.loads(table["config"][1])["router_losses"] == {}


def test_a_run_that_fails_costs_no_other_and_a_diverged_one_is_a_row(tmp_path: Path) -> None:
    class Broken(Router):
        def forward(self, hidden: torch.Tensor, context: RoutingContext | None = None) -> Routing:
            raise RuntimeError("broken")

    ROUTERS["broken"] = Broken
    ENTRIES["broken"] = dict(router="broken")
    options = dict(entries=["broken", "dense"], tasks=["chains"], seeds=1)
    failures: list[str] = []
    path = tmp_path / "t.parquet"
    table = run.play(path, settings=TINY, on_failure=lambda now, e: failures.append(f"{now.entry} {e}"), **options)
    assert failures == ["broken broken"]
    assert table["entry"].to_list() == ["dense"]
    hot = replace(TINY, rate=1e30, steps=4)
    table = run.play(tmp_path / "hot.parquet", settings=hot, entries=["dense"], tasks=["chains"], seeds=1)
    assert table["loss"].to_list() == [float("inf")]
    assert "the loss is" in table["note"][0]
    assert "1 diverged" in page.figure(table)
    assert page.lines(table)[1][0][1] == "(1 diverged)"


# What is measured


def test_slots_are_counted_by_domain_and_unused_ones_are_not() -> None:
    task = tasks.TASKS["chains"]()
    model = run.build("row", TINY, task)
    counts, tokens = measure.slots_by_domain(model, task)
    assert [int(c.sum()) for c in counts] == [2 * tokens] * 2
    balance = measure.balance(counts, tokens)
    assert balance["information"] == pytest.approx(2.0)  # four domains, experts of their own
    assert balance["violation"] == pytest.approx(1.0)  # 8 of 16 experts serve all
    assert balance["entropy"] == pytest.approx(0.75)
    assert measure.balance([], tokens)["slots"] is None
    chosen = run.build("expert_choice", TINY, task)
    for router in measure.routers_of(chosen):
        router.threshold.fill_(2.0)  # nothing reaches it
    counts, _ = measure.slots_by_domain(chosen, task)
    assert [int(c.sum()) for c in counts] == [0, 0]


def test_the_loss_counts_scored_tokens_alone() -> None:
    task = tasks.TASKS["ciphers"]()
    model = run.build("dense", TINY, task)
    with torch.no_grad():
        logits = model(input_ids=task.heldout.ids).logits[:, :-1].log_softmax(-1)
    scored = task.scored[:, 1:] & (task.heldout.domain == 1)[:, None]
    target = task.heldout.ids[:, 1:]
    expected = -logits.gather(2, target[..., None])[..., 0][scored].mean()
    assert measure.heldout_loss(model, task)["rule 1"] == pytest.approx(float(expected), rel=1e-5)


def test_a_router_made_of_routers_counts_once() -> None:
    class Outer(Router):
        def __init__(self, hidden_size: int, num_experts: int, top_k: int):
            super().__init__(hidden_size, num_experts, top_k)
            self.inner = ROUTERS["top_k"](hidden_size, num_experts, top_k)

        def forward(self, hidden: torch.Tensor, context: RoutingContext | None = None) -> Routing:
            return self.inner(hidden, context)

    ROUTERS["outer"] = Outer
    ENTRIES["outer"] = dict(router="outer")
    plain, nested = (run.build(name, TINY) for name in ("top_k", "outer"))
    assert len(measure.routers_of(nested)) == 2
    assert measure.parameters(nested) == measure.parameters(plain)


# Generated tasks


def test_the_rules_are_the_same_for_every_seed_and_the_rows_are_not() -> None:
    first, second = chains(0, 64), chains(1, 64)
    assert not np.array_equal(first.ids, second.ids)
    rules = permutations("chains", 16, 256)
    for rows in (first, second):
        followed = rules[rows.domain[:, None], rows.ids[:, 1:-1]] == rows.ids[:, 2:]
        assert (followed | ~rows.scored[:, 2:]).all()
        assert rows.ids.max() < rows.vocab
    assert len({tuple(sorted(rule)) for rule in rules}) == 1
    assert 0.85 < first.scored[:, 2:].mean() < 0.95


def test_ciphers_are_their_words_under_the_rule() -> None:
    rows = ciphers(0, 32, words=2, word=3, domains=4, alphabet=8)
    blocks = rows.ids.reshape(32, 2, 8)
    rules = permutations("ciphers", 4, 8)
    assert (blocks[:, :, 5:] == rules[rows.domain[:, None, None], blocks[:, :, 1:4]]).all()
    assert (rows.scored.reshape(32, 2, 8) == ([False] * 5 + [True] * 3)).all()


# The command


def test_the_command_trains_shows_and_writes(tmp_path: Path) -> None:
    del MEASURES["dense"]
    MEASURES["top_k"] = lambda model, task: {"layers": float(len(model.model.layers))}
    shown = league("--only", "dense", "--only", "top_k")
    for said in ("4/4 top_k on ciphers, seed 0", "ranks nothing", "league-quick.parquet", "league-quick.md", "active"):
        assert said in re.sub(r"\n", " ", shown)
    text = Path("league-quick.md").read_text()
    for said in ("2 steps and 1 seed", "league-quick.svg", "## Measured for some entries", "| top_k | 2.000 |"):
        assert said in text
    assert Path("league-quick.svg").read_text().count("<circle") == 8  # dense has no load, no specialisation
    again = league("--only", "top_k", "--show")
    assert "on chains, seed 0" not in again
    assert "top_k" in again


def test_anything_that_can_be_called_may_measure() -> None:
    MEASURES["top_k"] = partial(lambda number, model, task: {"number": number}, 3.0)
    table = run.play(Path("part.parquet"), settings=TINY, entries=["top_k"], tasks=["chains"], seeds=1)
    assert json.loads(table["extra"][0]) == {"number": 3.0}


def test_an_entry_from_a_file_joins_the_rows_that_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    run.play(run.recorded(True), settings=TINY, entries=["dense"], seeds=1)
    monkeypatch.delitem(sys.modules, "mine_too", raising=False)
    Path("mine_too.py").write_text(
        "from moestro.evidence.league import ENTRIES\nENTRIES['mine'] = {'router': 'random', 'router_losses': {}}\n"
    )
    league("--with", "mine_too.py", "--only", "mine")
    assert set(run.read(Path("league-quick.parquet"))["entry"]) == {"dense", "mine"}
    assert set(run.read(run.recorded(True))["entry"]) == {"dense"}
    Path("nothing.py").write_text("")
    with pytest.raises(ValueError, match="it adds no entry"):
        league_command.load(Path("nothing.py"))
    Path("json.py").write_text("")
    with pytest.raises(ValueError, match="there is a module 'json' already"):
        league_command.load(Path("json.py"))


def test_the_example_of_the_new_router_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (DOCS / "new-router.md").read_text()
    file, train = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(file.splitlines()) <= 40
    Path("my_router.py").write_text(file)
    monkeypatch.setattr(training, "SIZE", {**training.SIZE, **SMALL})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_router", raising=False)
    names: dict = {}
    exec(compile(train.replace("steps=200", "steps=1"), "new-router.md", "exec"), names)
    assert isinstance(names["trained"].model, MoELMForCausalLM)
    (commands,) = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    first, second = (line.removeprefix("$ moestro league ").split() for line in commands.strip().splitlines())
    league(*(word for word in first if word != "--quick"))
    league(*second)
    table = run.read(Path("league-quick.parquet"))
    assert set(table["entry"]) == {"mine", "top_k", "random", "dense"}
    assert table.filter(pl.col("entry") == "mine")["config"].unique().to_list() == [
        '{"router": {"kind": "mine", "temperature": 0.2}}'
    ]
    del sys.modules["my_router"]


def test_row_routing_refuses_what_it_cannot_know() -> None:
    router = ROUTERS["row"](8, 6, 2)
    ids = torch.tensor([[4, 0, 1], [5, 2, 3]])
    routing = router(torch.zeros(6, 8), RoutingContext(shape=(2, 3), input_ids=ids))
    assert routing.indices.tolist() == [[2, 3]] * 3 + [[4, 5]] * 3
    with pytest.raises(ValueError, match="use_cache=False"):
        router(torch.zeros(2, 8), RoutingContext(shape=(2, 1), input_ids=ids[:, -1:]))
