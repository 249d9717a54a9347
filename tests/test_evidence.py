"""Claims and records hold what they say, EASY-EP is its equations, demonstrations are the model's own words."""

import math
import statistics
import types
import warnings
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

import moestro
from families.tiny import build
from moestro.cli import app
from moestro.compress.prune.demonstrations import demonstrations
from moestro.compress.prune.easy_ep import EasyEPStats, EasyEPSums, easy_ep, mix, overlap
from moestro.compress.prune.keep import keep_best
from moestro.compress.prune.saliency import gating_score
from moestro.data import Document, TokenBatch, token_batches
from moestro.evidence import easy_ep as experiment
from moestro.evidence import page, records
from moestro.evidence.base import Claim, Evidence, Row, Rows, ratio
from moestro.fitting.evaluate import heldout_loss
from moestro.view.observe import SlotStats

NUMBERS = st.floats(-100, 100)

# Claims and rows


@given(NUMBERS, NUMBERS)
def test_a_claim_holds_by_its_relation_alone(measured: float, needed: float) -> None:
    held = {r: Claim(name="c", measured=measured, relation=r, needed=needed).holds for r in ("<=", "<", ">=", ">")}
    assert held == {
        "<=": measured <= needed,
        "<": measured < needed,
        ">=": measured >= needed,
        ">": measured > needed,
    }


@pytest.mark.parametrize("relation", ["<=", "<", ">=", ">"])
def test_what_could_not_be_measured_never_holds(relation: str) -> None:
    claim = Claim(name="c", measured=math.nan, relation=relation, needed=0)
    assert not claim.holds
    assert not Claim.model_validate_json(claim.model_dump_json()).holds


def test_a_written_verdict_is_not_believed() -> None:
    text = Claim(name="c", measured=1, relation="<", needed=0).model_dump_json().replace("false", "true")
    assert '"holds":true' in text
    assert not Claim.model_validate_json(text).holds


def test_a_ratio_to_nothing_meets_no_claim() -> None:
    assert ratio(1, 2) == 0.5
    assert math.isnan(ratio(1, 0))
    assert math.isnan(ratio(-1, -2))


@given(st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=2, max_size=4))
def test_the_mean_over_domains_is_taken_draw_by_draw(by_domain: list[list[float]]) -> None:
    rows = Rows()
    names = [f"d{i}" for i in range(len(by_domain))]
    for name, values in zip(names, by_domain):
        for value in values:
            rows.add("loss", {"domain": name, "score": "s"}, value)
    rows.add_mean("loss", {"domain": "", "score": "s"}, "domain", names, "mean")
    got = rows.values("loss", {"domain": "mean", "score": "s"})
    assert got == pytest.approx([statistics.fmean(draw) for draw in zip(*by_domain)])
    row = Row(metric="loss", setting={}, values=got)
    assert row.mean == pytest.approx(torch.tensor(got, dtype=torch.float64).mean().item())
    assert row.sd == pytest.approx(torch.tensor(got, dtype=torch.float64).std().item(), abs=1e-9)


def test_a_mean_over_unequal_draws_is_refused() -> None:
    rows = Rows([Row(metric="m", setting={"d": "a"}, values=[1, 2]), Row(metric="m", setting={"d": "b"}, values=[1])])
    with pytest.raises(ValueError):
        rows.add_mean("m", {"d": ""}, "d", ["a", "b"], "mean")


# Records


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A small paper with files, results and a page of its own."""
    package = tmp_path / "checkout" / "src" / "moestro"
    (package / "methods").mkdir(parents=True)
    (package / "methods" / "a.py").write_text("def f(x):\n    return x + 1\n")
    (package / "data.bin").write_bytes(b"1")
    (tmp_path / "checkout" / "pyproject.toml").touch()
    module = types.ModuleType("small")
    module.__file__ = str(package / "small.py")
    Path(module.__file__).write_text('"""About."""\nNOT_SHOWN = {}\nLIMIT = 1\n')
    module.__doc__ = "About a | b."
    module.TITLE, module.ARXIV, module.CLAIM = "A small paper", "0000.00000", "Small is enough."
    module.SOURCES, module.QUICK = ("methods/*.py", "*.bin"), {"draws": 1}
    module.NOT_SHOWN = {"fails": "too small a scale"}

    def run(*, draws: int = 2, model: str = "quartet", progress: bool = True) -> Evidence:
        values = [0.5, 1.5][:draws]
        rows = [Row(metric="loss", setting={"kept": k, "score": "s"}, values=values) for k in ("50%", "25%")]
        claims = [
            Claim(name="holds", measured=1, relation=">", needed=0),
            Claim(name="fails", measured=0, relation=">", needed=1),
        ]
        return Evidence(rows=rows, claims=claims)

    module.run = run
    monkeypatch.setattr(records, "papers", lambda: {"small": module})
    monkeypatch.setattr(records, "PACKAGE", package)
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    return module


def test_a_record_comes_back_as_it_was_saved(paper: types.ModuleType) -> None:
    assert records.load("small") is None
    record = records.run("small", progress=False)
    assert [c.reason for c in record.claims] == [None, "too small a scale"]
    assert record.settings == {"draws": 2, "model": "quartet"}
    records.save(record)
    assert records.load("small") == record


def test_reasons_are_the_modules_present_ones(paper: types.ModuleType) -> None:
    records.save(records.run("small", progress=False))
    paper.NOT_SHOWN = {"fails": "a better reason", "holds": "never printed"}
    assert [c.reason for c in records.load("small").claims] == [None, "a better reason"]


def test_unknown_papers_and_settings_are_refused_with_the_known_ones(paper: types.ModuleType) -> None:
    with pytest.raises(ValueError, match="no paper 'tiny' is covered; there are: small"):
        records.run("tiny")
    with pytest.raises(ValueError, match="no setting 'dros'; it has draws, model"):
        records.run("small", dros=1)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "r.json"
    records.write_whole(path, "old")
    records.write_whole(path, "new")
    assert path.read_text() == "new"

    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(records.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        records.write_whole(path, "newer")
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]
    assert path.read_text() == "new"


def test_a_result_is_stale_when_what_made_it_changed(paper: types.ModuleType) -> None:
    package = records.PACKAGE
    record = records.run("small", progress=False)
    assert records.stale(record) == []

    method, own = package / "methods" / "a.py", package / "small.py"
    method.write_text(
        '"""Now described."""\n\n\ndef f(x):  # adds one\n    """One more."""\n    return (\n x + 1\n )\n'
    )
    own.write_text('"""Told better."""\nNOT_SHOWN = {"fails": "scale"}\nLIMIT = 1\n')
    assert records.stale(record) == []  # prose is not code

    method.write_text("def f(x):\n    return x + 2\n")
    assert records.stale(record) == ["methods/a.py"]
    own.write_text("NOT_SHOWN = {}\nLIMIT = 2\n")
    (package / "data.bin").write_bytes(b"2")
    (package / "methods" / "b.py").write_text("")
    assert records.stale(record) == ["data.bin", "methods/a.py", "methods/b.py", "small.py"]


# Pages and commands


def test_tables_lay_a_metric_out_by_its_last_name(paper: types.ModuleType) -> None:
    rows = [
        Row(metric="loss", setting={"kept": k, "domain": d, "score": s}, values=values)
        for k, d, s, values in (("50%", "x", "a", [1.0, 3.0]), ("50%", "x", "b", [2.0]), ("25%", "y", "b", [0.25]))
    ]
    (table,) = page.tables(rows)
    assert table.header == ["kept", "domain", "a", "b"]
    assert table.lines == [["50%", "x", "2.000 ± 1.414", "2.000"], ["25%", "y", "", "0.250"]]


def test_reproduce_records_a_full_run_and_a_claim_not_shown_is_no_error(paper: types.ModuleType) -> None:
    result = CliRunner().invoke(app, ["reproduce", "small"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "1.000 ± 0.707" in result.output
    assert "not shown: too small a scale" in result.output
    assert records.load("small") is not None
    text = page.page_path().read_text()
    assert text == page.markdown()
    for part in (
        "About a | b.",
        "| 50% | 1.000 ± 0.707 |",
        "not shown: too small a scale",
        "1 of 2",
        "Small is enough.",
    ):
        assert part in text


@pytest.mark.parametrize("options", [["--quick"], ["--model", "elsewhere"]])
def test_other_runs_are_printed_and_not_recorded(paper: types.ModuleType, options: list[str]) -> None:
    result = CliRunner().invoke(app, ["reproduce", "small", *options])
    assert result.exit_code == 0, result.output
    assert "not recorded" in result.output
    assert records.load("small") is None
    assert not page.page_path().exists()


@pytest.mark.parametrize("arguments", [["tiny"], ["small", "tiny"], [], ["small", "--all"]])
def test_reproduce_refuses_before_it_runs(paper: types.ModuleType, arguments: list[str]) -> None:
    paper.run = None
    result = CliRunner().invoke(app, ["reproduce", *arguments])
    assert isinstance(result.exception, ValueError)
    assert "small" in str(result.exception)


def test_papers_tells_what_was_shown_and_what_is_old(paper: types.ModuleType) -> None:
    run = lambda: CliRunner().invoke(app, ["papers"], env={"COLUMNS": "200"}).output  # noqa: E731
    assert "not run yet" in run()
    records.save(records.run("small", progress=False).model_copy(update={"date": datetime(2020, 2, 3, tzinfo=UTC)}))
    for part in ("small", "A small paper", "0000.00000", "2020-02-03"):
        assert part in run()
    assert "older than its code" not in run()
    (records.PACKAGE / "methods" / "a.py").write_text("")
    assert "older than its code: methods/a.py" in " ".join(run().split())


# The recorded results


def test_the_page_is_what_the_records_say() -> None:
    assert page.page_path().read_text() == page.markdown(), "run `moestro papers --docs`"


@pytest.mark.parametrize("key", list(records.papers()))
def test_a_recorded_result_is_whole(key: str) -> None:
    module, record = records.paper(key), records.load(key)
    if record is None:
        pytest.skip(f"{key} has not been run")
    assert str([c.model_copy(update={"reason": None}) for c in record.claims]) == str(module.claims(Rows(record.rows)))
    assert all([*records.PACKAGE.glob(pattern)] for pattern in module.SOURCES)
    unexplained = [c.name for c in record.claims if not c.holds and not c.reason]
    assert not unexplained
    assert set(getattr(module, "NOT_SHOWN", {})) <= {c.name for c in record.claims}
    if changed := records.stale(record):
        warnings.warn(f"{key}: its result is older than {changed}; run `moestro reproduce {key}`", stacklevel=1)


# EASY-EP by hand


def batches(padding: str, domains: tuple[str, ...] = ("x", "y"), vocab: int = 131) -> list[TokenBatch]:
    """Two batches of three rows of unequal length, the domains taking turns."""
    found = []
    for number in range(2):
        ids = torch.randint(40, vocab, (3, 12), generator=torch.Generator().manual_seed(number))
        mask = torch.ones_like(ids)
        for row in range(3):
            mask[row, : 2 * row] = 0
        if padding == "right":
            mask = mask.flip(1)
        sample = torch.arange(3) + 3 * number
        found.append(TokenBatch(ids * mask, mask, sample, torch.zeros(3).long(), sample % len(domains), domains))
    return found


@torch.no_grad()
def by_hand(model: torch.nn.Module, data: list[TokenBatch]) -> dict[int, dict[str, Tensor]]:
    """{layer: {term: [D, E]}}: the sums of EASY-EP, read with hooks and computed token by token."""
    sums: dict[int, dict[str, Tensor]] = {}
    for batch in data:
        seen: dict[int, dict[str, Tensor]] = {}
        hooks = []
        for index, layer in enumerate(model.model.layers):
            if not hasattr(layer.mlp, "experts"):
                continue
            kept = seen.setdefault(index, {})
            norm, gate, experts = layer.post_attention_layernorm, layer.mlp.gate, layer.mlp.experts
            hooks += [
                norm.register_forward_pre_hook(lambda _, args, kept=kept: kept.update(stream=args[0])),
                gate.register_forward_hook(lambda _, a, out, kept=kept: kept.update(weights=out[1], indices=out[2])),
                experts.register_forward_pre_hook(lambda _, args, kept=kept: kept.update(x=args[0])),
            ]
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        for hook in hooks:
            hook.remove()
        for index, kept in seen.items():
            experts = model.model.layers[index].mlp.experts
            stream = kept["stream"].flatten(0, 1).double()
            zeros = torch.zeros(2, experts.num_experts, dtype=torch.float64)
            table = sums.setdefault(index, {name: zeros.clone() for name in ("n", "g", "gs", "c", "cs")})
            for token in batch.attention_mask.flatten().nonzero().squeeze(1).tolist():
                domain = int(batch.domain[token // batch.input_ids.shape[1]])
                outputs = {}
                for expert in kept["indices"][token].tolist():
                    gate, up = (experts.gate_up_proj[expert].double() @ kept["x"][token].double()).chunk(2)
                    outputs[expert] = experts.down_proj[expert].double() @ (torch.nn.functional.silu(gate) * up)
                g = dict(zip(kept["indices"][token].tolist(), kept["weights"][token].double()))
                h = stream[token]
                turned = h + sum(g[e] * outputs[e] for e in g)
                s = max(0.0, 1 - float(h @ turned / (h.norm() * turned.norm())))
                for e in g:
                    c = g[e] * outputs[e].norm()
                    for name, value in (("n", 1.0), ("g", g[e]), ("gs", g[e] * s), ("c", c), ("cs", c * s)):
                        table[name][domain, e] += float(value)
    return sums


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("normalised", [True, False])
def test_easy_ep_is_its_equations(padding: str, normalised: bool) -> None:
    small = build("qwen3_moe", norm_topk_prob=normalised)
    data = batches(padding)
    view = moestro.open(small.model)
    sums, slots = view.observe(data, [EasyEPStats(), SlotStats()], progress=False)
    expected = by_hand(small.model, data)
    assert [*sums.layers] == [*expected] == [layer.index for layer in view.layers]
    assert 0 not in sums.layers  # its first layer is dense: layers are the decoder's, not counted from the first MoE
    variants = {"cs": {}, "gs": {"norm": False}, "c": {"token": False}, "g": {"norm": False, "token": False}}
    rows = {"x": 0, "y": 1}
    for term, options in variants.items():
        single = {name: easy_ep(sums.domain(name), **options) for name in rows}
        mixed = easy_ep(sums, **options)
        for index, want in expected.items():
            parts = []
            for name, row in rows.items():
                reference = torch.where(want["n"][row] > 0, want[term][row], torch.nan)
                torch.testing.assert_close(single[name][index], reference, rtol=2e-3, atol=1e-7, equal_nan=True)
                parts.append(want[term][row] / want[term][row].sum())
            reference = torch.where(want["n"].sum(dim=0) > 0, torch.stack(parts).mean(dim=0), torch.nan)
            torch.testing.assert_close(mixed[index], reference, rtol=2e-3, atol=1e-7, equal_nan=True)
    both_off = easy_ep(sums.domain("x"), norm=False, token=False)
    for index, score in gating_score(slots.domain("x")).items():
        torch.testing.assert_close(both_off[index], score, rtol=1e-6, atol=0, equal_nan=True)


def test_an_unknown_domain_has_no_sums() -> None:
    sums = EasyEPSums(("x",), {0: {"gate": torch.zeros(1, 2, dtype=torch.float64)}})
    with pytest.raises(ValueError, match="no domain 'z' was observed"):
        sums.domain("z")


@given(st.lists(st.lists(st.floats(0.01, 10), min_size=6, max_size=6), min_size=1, max_size=4), st.floats(0.1, 1000))
def test_no_domain_outvotes_another_by_its_size(scores: list[list[float]], factor: float) -> None:
    domains = [torch.tensor(s, dtype=torch.float64) for s in scores]
    mixed = mix(domains)
    torch.testing.assert_close(mix([domains[0] * factor, *domains[1:]]), mixed)
    torch.testing.assert_close(mixed.sum(), torch.ones((), dtype=torch.float64))


def test_overlap_is_the_share_of_experts_in_common() -> None:
    a = {3: torch.tensor([4.0, 3.0, 2.0, 1.0]), 5: torch.tensor([1.0, 2.0, torch.nan, 0.0])}
    b = {3: torch.tensor([1.0, 3.0, 4.0, 2.0]), 5: torch.tensor([5.0, 6.0, 7.0, 0.5])}
    assert overlap(a, b, 2) == {3: 0.5, 5: 0.5}
    assert overlap(a, a, 2) == {3: 1.0, 5: 1.0}


# Demonstrations


def prompts(side: str = "right") -> TokenBatch:
    lengths = (3, 7, 5)
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(8 - length, 8)
        ids[row, place] = torch.randint(40, 131, (length,), generator=torch.Generator().manual_seed(row))
        mask[row, place] = 1
    return TokenBatch(ids, mask, torch.tensor([4, 5, 6]), torch.zeros(3).long(), torch.tensor([1, 0, 1]), ("x", "y"))


def rows_of(batch: TokenBatch) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_demonstrations_are_what_each_prompt_generates_alone(side: str) -> None:
    model = build("qwen3_moe").model
    alone = []
    model.generation_config.eos_token_id = None
    for ids in rows_of(prompts()):
        out = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        alone.append(out[0].tolist())
    view = moestro.open(model)
    (got,) = demonstrations(view, [prompts(side)], 6, progress=False)
    assert rows_of(got) == alone
    assert (got.sample.tolist(), got.domain.tolist(), got.domains) == ([4, 5, 6], [1, 0, 1], ("x", "y"))
    assert (got.attention_mask.diff(dim=1) <= 0).all()  # right padding

    end = alone[1][8]  # the second row's second word now ends an answer
    model.generation_config.eos_token_id = [end, 1]
    (got,) = demonstrations(view, [prompts(side)], 6, progress=False)
    for row, whole, start in zip(rows_of(got), alone, (3, 7, 5)):
        written = whole[start:]
        assert row[start:] == written[: written.index(end) + 1 if end in written else 6]
        assert row[:start] == whole[:start]


def test_sampled_demonstrations_follow_the_seed_and_leave_the_global_one() -> None:
    view = moestro.open(build("qwen3_moe").model)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a, b, c = (demonstrations(view, [prompts()], 8, temperature=1.0, seed=s, progress=False)[0] for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert rows_of(a) == rows_of(b) != rows_of(c)


@pytest.mark.parametrize("new_tokens", [0, 90])
def test_demonstrations_that_do_not_fit_are_refused(new_tokens: int) -> None:
    view = moestro.open(build("qwen3_moe").model)
    with pytest.raises(ValueError, match=rf"up to 7 tokens and new_tokens={new_tokens} do not fit a context of 96"):
        demonstrations(view, [prompts()], new_tokens, progress=False)


# The experiment, on a model that knows nothing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    path = str(tmp_path_factory.mktemp("tiny"))
    vocab = {"<pad>": 0, "<bos>": 1, **{f"w{i}": i for i in range(2, 131)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>").save_pretrained(path)
    build("qwen3_moe").model.save_pretrained(path)
    return path


@pytest.fixture
def small_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(domains: str | tuple[str, ...], split: str) -> list[Document]:
        generator = torch.Generator().manual_seed(len(split))
        wanted = (domains,) if isinstance(domains, str) else domains
        return [
            Document(" ".join(f"w{2 + 40 * experiment.DOMAINS.index(d) + i}" for i in ids), domain=d, split=split)
            for d in wanted
            for ids in torch.randint(0, 40, (12, 100), generator=generator).tolist()
        ]

    monkeypatch.setattr(experiment, "embedded", texts)
    for name, value in (("HELDOUT_PROMPTS", 6), ("SHARES", ("50%", "25%"))):
        monkeypatch.setattr(experiment, name, value)


SMALL = dict(draws=2, random_seeds=2, prompt_tokens=6, answer_tokens=4, heldout_tokens=60, progress=False)


def test_the_experiment_measures_every_score_in_every_setting(checkpoint: str, small_experiment: None) -> None:
    evidence = experiment.run(model=checkpoint, **SMALL)
    again = Evidence.model_validate_json(evidence.model_dump_json())
    assert again.model_dump_json() == evidence.model_dump_json()
    assert str(experiment.claims(Rows(again.rows))) == str(evidence.claims)  # as text: NaN is not itself
    scores = {row.setting["score"] for row in evidence.rows if row.metric == experiment.OWN}
    assert scores == {"random", *experiment.SCORES}
    for row in evidence.rows:
        draws = 1 if row.metric == experiment.WHOLE else 4 if row.setting.get("score") == "random" else 2
        assert len(row.values) == draws, row
        assert all(math.isfinite(v) for v in row.values)
    assert len({c.name for c in evidence.claims}) == len(evidence.claims)


def test_what_is_measured_is_what_deletion_costs(checkpoint: str, small_experiment: None) -> None:
    view = moestro.open(checkpoint, dtype=torch.float32)
    _, sums = experiment.observe(view, 0, 6, 4)
    texts = experiment.embedded(experiment.DOMAINS, "heldout")
    data = token_batches(texts, view.tokenizer, max_length=16)
    (answers,) = demonstrations(view, [experiment.windows(texts, view.tokenizer, 6, 5, seed=0)], 4, progress=False)
    done: list[bool] = []
    pruning = experiment.Pruning(view, data, {"code": answers}, 6, on_done=lambda: done.append(True))
    scores = easy_ep(sums.domain("code, 25"))
    increase = pruning.increase(scores, 4, ["code"])
    view.keep_experts(keep_best(view.layers, scores, 4))
    cut = {d: loss for d, (loss, _) in heldout_loss(view.model, data, progress=False).items()}
    one_by_one = []
    for ids, real in zip(answers.input_ids, answers.attention_mask):
        ids = ids[real.bool()]
        with torch.no_grad():
            logits = view.model(ids[None]).logits[0]
        one_by_one += [-float(logits[i - 1].log_softmax(-1)[ids[i]]) for i in range(6, len(ids))]
    cut["code, answers"] = statistics.fmean(one_by_one)
    assert increase == pytest.approx({name: loss - pruning.whole[name] for name, loss in cut.items()}, abs=1e-5)
    assert done == [True]


def test_windows_do_not_overlap_and_open_like_a_text(checkpoint: str, small_experiment: None) -> None:
    tokenizer = moestro.open(checkpoint).tokenizer
    words = " ".join(f"w{i}" for i in range(2, 100))
    drawn = experiment.windows([Document(words), Document(words)], tokenizer, 10, 20, seed=0)
    assert drawn.input_ids.shape == (20, 10)
    assert (drawn.input_ids[:, 0] == 1).all()
    assert (drawn.input_ids[:, 1:].diff(dim=1) == 1).all()
    starts = drawn.input_ids[:, 1].tolist()
    assert sorted(set(starts)) == sorted(starts)[::2] == list(range(2, 2 + 90, 9))
    with pytest.raises(ValueError, match="2 texts hold 20 stretches of 10 tokens; 21 are needed"):
        experiment.windows([Document(words), Document(words)], tokenizer, 10, 21, seed=0)
