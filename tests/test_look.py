"""moestro look: the numbers against plain counting, the page in a browser, and what bad input says."""

import base64
import gzip
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
import torch
import transformers

import moestro
import tiny
from moestro import cli
from moestro.analyze.expert_cache import Requests
from moestro.analyze.retrieval_heads import Answers, RetrievalScores
from moestro.data.needles import NeedleRun
from moestro.looking import locality, pipeline
from moestro.looking.collect import TRIAL_TOKENS
from moestro.looking.commands import layer_numbers
from moestro.looking.heads import scored_section
from moestro.looking.locality import simulated
from moestro.looking.result import Heat, Lines, Listing, Section
from moestro.report import look_page
from moestro.view.events import Tokens
from moestro.view.observe import ExpertCounts

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DATA = ["embedded:code", "embedded:ui-en", "embedded:ui-de", "embedded:sorting"]
LIMITS = dict(tokens=1500, max_length=64, seed=3)
SMALL = dict(tokens=200, max_length=32, seed=3, progress=False)
ATTACK = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&<b>'
LARGEST_PAGE = 8_000_000
"""Bytes of the page for 48 layers x 128 experts."""
SECONDS = 3.0
"""In which the page of 48 layers x 128 experts opens and is scrolled through."""


@pytest.fixture(scope="module")
def quartet():
    return moestro.open("quartet")


@pytest.fixture(scope="module")
def looked(quartet, tmp_path_factory):
    """(the report, its directory)"""
    out = tmp_path_factory.mktemp("look") / "quartet"
    return pipeline.look(quartet, DATA, reference="ui-en", out=out, progress=False, **LIMITS), out


@pytest.fixture
def no_heads(monkeypatch):
    """Leaves out the pass of the retrieval heads, which takes longer than all the rest of a small look."""
    monkeypatch.setattr(pipeline, "heads_section", lambda *_, **__: Section("heads", "Heads", absent="Left out."))


@pytest.fixture(scope="module")
def counted(quartet):
    """(tokens of each domain that every expert served, the domains), on the experts backend that a look runs on"""
    before = quartet.model.config._experts_implementation
    quartet.model.set_experts_implementation("moestro")
    observer = ExpertCounts()
    (counts,) = quartet.observe(pipeline.read_data(quartet, DATA, **LIMITS), [observer], progress=False)
    quartet.model.set_experts_implementation(before)
    return counts, observer.domains


# ------------------------------------------------------------------------------------------------ the numbers


def test_the_model_runs_once_over_every_batch(quartet, monkeypatch, no_heads) -> None:
    sizes = []
    forward = type(quartet.stack).forward

    def counted(self, input_ids, **inputs):
        sizes.append(input_ids.shape)
        return forward(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(type(quartet.stack), "forward", counted)
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 256)
    batches = pipeline.read_data(quartet, DATA, tokens=200, max_length=32, seed=3)
    pipeline.look(quartet, DATA, **SMALL)
    trial, *rest = sizes
    assert trial == (1, TRIAL_TOKENS)
    assert rest == [batch.input_ids.shape for batch in batches]
    assert len(rest) > 2


def test_loads_are_those_of_plain_counting(counted, looked) -> None:
    report, out = looked
    counts, _ = counted
    wanted = {layer: table.sum(dim=0).long().tolist() for layer, table in counts.items()}
    table = pl.read_parquet(out / "load.parquet")
    assert {layer: rows["tokens"].to_list() for (layer,), rows in table.group_by("layer")} == wanted
    csv = pl.read_csv(out / "routing_profile.csv")
    assert csv.columns == ["layer", "expert", "count"]
    assert csv["count"].to_list() == [n for layer in sorted(wanted) for n in wanted[layer]]
    profile = json.loads((out / "routing_profile.json").read_text())
    assert profile["logical_count"] == [wanted[layer] for layer in sorted(wanted)]
    assert sum(map(sum, profile["logical_count"])) == sum(report.tokens.values()) * 6 * 4
    for layer, order in profile["hottest_first"].items():
        ranked = [wanted[int(layer)][e] for e in order]
        assert ranked == sorted(ranked, reverse=True)
        assert sorted(order) == list(range(32))


def test_an_expert_that_serves_nothing_is_named(quartet, no_heads) -> None:
    with quartet.edits(moestro.SwitchOff({(2, 5), (2, 6), (4, 0)})):
        report = pipeline.look(quartet, ["embedded:code"], **SMALL)
    assert report.section("load").findings[0].startswith("3 of 192 experts served no token")
    named = report.section("load").figures[2].table
    assert {row["layer"]: row["dead"] for row in named.to_dicts() if row["dead"]} == {2: "5–6", 4: "0"}


def test_shares_by_domain_are_those_of_plain_counting(counted, looked) -> None:
    report, out = looked
    counts, domains = counted
    table = pl.read_parquet(out / "specialisation.parquet")
    for (domain, layer), rows in table.group_by("domain", "layer"):
        wanted = counts[layer][domains.index(domain)] / report.tokens[domain]
        np.testing.assert_allclose(rows.sort("expert")["share"].to_numpy(), wanted.numpy(), rtol=1e-9)


def test_a_hot_set_is_chosen_on_other_texts_than_it_is_measured_on(looked) -> None:
    table = looked[0].section("profile").figures[1].table
    assert (table["experts"] == 8).all()
    assert ((table["low"] <= table["served"]) & (table["served"] <= table["high"])).all()
    assert (table["served"] > table["even_share"]).all()


def test_every_figure_has_its_table_beside_the_page_and_in_it(looked) -> None:
    report, out = looked
    html = (out / pipeline.PAGE).read_text(encoding="utf-8")
    assert len({figure.name for figure in report.figures}) == len(report.figures)
    for figure in report.figures:
        written = pl.read_parquet(out / f"{figure.name}.parquet")
        assert written.equals(figure.table)
        packed = re.search(rf'id="table-{figure.name}">([^<]*)<', html).group(1)
        inside = json.loads(gzip.decompress(base64.b64decode(packed)))
        assert inside["names"] == written.columns
        for name, column in zip(inside["names"], inside["columns"], strict=True):
            if name in inside["words"]:
                assert [inside["words"][name][i] for i in column] == written[name].to_list()
            else:
                values = [np.nan if v is None else v for v in column]
                np.testing.assert_allclose(values, written[name].cast(pl.Float64).fill_null(np.nan), rtol=1e-3)


def test_lines_hold_no_interval_that_misses_its_value(looked) -> None:
    for figure in looked[0].figures:
        if isinstance(figure, Lines):
            rows = figure.table.drop_nulls().filter(~pl.col("series").is_in(figure.controls))
            assert ((rows["low"] <= rows["value"]) & (rows["value"] <= rows["high"])).all(), figure.name


def test_each_section_says_how_to_read_it_and_what_it_found(looked) -> None:
    for section in looked[0].sections:
        assert bool(section.absent) != bool(section.findings), section.key
        for figure in section.figures:
            assert figure.read.endswith(".")
            assert figure.title


def test_layers_can_be_chosen_and_an_old_look_is_replaced(quartet, no_heads, tmp_path) -> None:
    for old in (pipeline.PAGE, "stale.parquet"):
        (tmp_path / old).write_text("old")
    report = pipeline.look(quartet, DATA, layers=[4, 1], out=tmp_path, overwrite=True, **SMALL)
    assert (tmp_path / pipeline.PAGE).stat().st_size > 10_000
    assert not (tmp_path / "stale.parquet").exists()
    profile = json.loads((tmp_path / "routing_profile.json").read_text())
    assert [bool(sum(row)) for row in profile["logical_count"]] == [False, True, False, False, True, False]
    assert report.layers == {1: 32, 4: 32}
    for figure in report.figures:
        if "layer" in figure.table.columns:
            assert set(figure.table["layer"].unique()) <= {1, 4}


def scores_of(planted: dict[tuple[int, int], float], runs: int = 12, heads: int = 4) -> RetrievalScores:
    """Two layers in which the planted heads copy that share of the answers, and all others nothing."""
    asked = [NeedleRun((1, 2, 3, 4), (2, 3, 4), (1, 4), 0.0, 0)] * runs
    table = {layer: torch.zeros(runs, heads) for layer in (0, 1)}
    for (layer, head), share in planted.items():
        table[layer][:, head] = share + 0.05 * (torch.arange(runs) % 3)
    nothing = {layer: torch.zeros(runs, heads) for layer in (0, 1)}
    copies = {layer: t > 0 for layer, t in table.items()}
    return RetrievalScores(Answers(asked, [[2, 3, 4]] * runs), 0.5, table, copies, nothing, nothing)


def test_heads_are_measured_on_prompts_that_did_not_choose_them() -> None:
    section = scored_section(scores_of({(0, 2): 0.5, (1, 1): 0.3}), "a second pass")
    assert section.findings[0].startswith("2 of 8 heads")
    assert "The 2 heads found on one half" in section.findings[1]
    assert "all other heads 0 [0, 0]" in section.findings[1]
    assert section.note == "a second pass"
    best = section.figures[1].table.row(0, named=True)
    assert (best["layer"], best["head"]) == (0, 2)
    assert len(scored_section(scores_of({}), "").findings) == 1


def test_a_cache_is_simulated_on_the_beginnings_of_whole_texts(monkeypatch) -> None:
    monkeypatch.setattr(locality, "SIMULATED_TOKENS", 30)
    monkeypatch.setattr(locality, "SIMULATED_LENGTH", 8)
    sample = torch.arange(6).repeat_interleave(20)
    position = torch.arange(20).repeat(6) + 100  # windows from the middle of texts
    zero = torch.zeros(120, dtype=torch.long)
    tokens = Tokens(sample, position, zero, zero, ("all",))
    taken = simulated(Requests(tokens, {0: torch.zeros(120, 2, dtype=torch.int16)}, {0: 4}), seed=0)
    assert len(taken.tokens) == 24
    assert taken.tokens.position.tolist() == [*range(100, 108)] * 3
    assert len(taken.experts[0]) == 24


def test_a_streamed_model_is_looked_at_all_the_same(quartet, no_heads) -> None:
    whole, streamed = (pipeline.look("quartet", DATA, stream=stream, **SMALL) for stream in (False, True))
    assert "streamed" in streamed.section("super-experts").absent
    mine, theirs = (r.section("load").figures[0].table["tokens"].to_numpy() for r in (whole, streamed))
    assert mine.sum() == theirs.sum()
    assert np.abs(mine - theirs).sum() < 0.05 * mine.sum()  # bf16 on two experts backends


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_other_families_are_looked_at(quartet, family, tmp_path) -> None:
    """Sigmoid routing with shared experts and a dense first layer; routing without a softmax over all."""
    view = moestro.open(tiny.make(family, vocab_size=6144).model, tokenizer=quartet.tokenizer)
    report = pipeline.look(view, DATA, out=tmp_path / "look", **SMALL)
    assert not report.section("super-experts").absent
    if family == "deepseek_v3":
        assert report.layers.keys() == {1, 2}
        profile = json.loads((tmp_path / "look" / "routing_profile.json").read_text())
        assert profile["logical_count"][0] == [0] * 8
        assert all(map(sum, profile["logical_count"][1:]))
        shared = report.section("super-experts").figures[0].table.filter(pl.col("expert") == -1)
        assert shared["layer"].to_list() == [1, 2]
        assert (shared["largest"] > 0).all()


# ------------------------------------------------------------------------------------------------ the page


class Page(HTMLParser):
    """Elements of the page, and those not closed in order."""

    VOID = frozenset({"meta", "img", "input", "link", "br"})

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.wrong, self._open = [], [], []
        self.feed(html)
        self.close()
        self.wrong += self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.wrong.append(tag)


def test_the_page_is_well_formed_and_asks_for_nothing(looked) -> None:
    html = (looked[1] / pipeline.PAGE).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.wrong
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    links = [a[name] for _, a in page.elements for name in ("href", "src") if name in a]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "url(" not in html.split("</style>")[0]


def test_names_of_domains_are_text(quartet, tmp_path, no_heads) -> None:
    lines = [json.dumps({"text": f"some words of number {i} to read", "domain": ATTACK}) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = pipeline.look(quartet, [str(tmp_path / "a.jsonl"), "embedded:code"], **SMALL)
    html = look_page(report)
    assert not Page(html).wrong
    assert "<img" not in html
    assert html.count("<script>") == 1


# ------------------------------------------------------------------------------------------------ bad input


def test_one_domain_says_what_it_cannot_show(quartet, no_heads) -> None:
    report = pipeline.look(quartet, ["embedded:code"], **SMALL)
    assert "'code'" in report.section("specialisation").absent
    assert "--data" in report.section("specialisation").absent
    assert "'code'" in report.section("divergence").absent
    assert "two domains" in report.section("depth").absent
    assert report.section("load").findings
    assert "absent" in look_page(report)


@pytest.mark.parametrize("text", ["three words only", "and many more words than that, " * 12])
def test_a_single_text_is_looked_at(quartet, text) -> None:
    report = pipeline.look(quartet, [{"text": text}], progress=False)
    assert report.texts == 1
    said = " ".join(finding for section in report.sections for finding in section.findings)
    assert "nan" not in said
    assert "None" not in said
    assert bool(report.section("locality").absent) == (text == "three words only")
    assert not Page(look_page(report)).wrong


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": "klingon"}, "no text of the reference 'klingon'; the domains are: code, sorting, ui-de, ui-en"),
        ({"layers": [2, 9]}, "decoder layer 9 has no experts"),
        ({"layers": []}, "no layer to look at"),
        ({"data": [{"text": "  "}]}, "not a single usable token"),
        ({"data": []}, "not a single usable token in 0 documents"),
        ({"data": ["missing.txt"]}, "no file or folder 'missing.txt'"),
        ({"tokens": 0}, "n=0 keeps no token"),
        ({"model": "solo"}, "experts"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(quartet, monkeypatch, changes, words) -> None:
    monkeypatch.setattr(pipeline, "collect", lambda *a, **k: pytest.fail("the model was run"))
    arguments = dict(model=quartet, data=DATA, progress=False) | LIMITS | changes
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        pipeline.look(arguments.pop("model"), arguments.pop("data"), **arguments)


def test_a_model_without_tokenizer_is_refused(quartet) -> None:
    with pytest.raises(ValueError, match="tokenizer="):
        pipeline.look(moestro.ExpertView(quartet.model), DATA)


def test_what_is_there_is_not_overwritten_by_accident(quartet, looked, tmp_path) -> None:
    with pytest.raises(FileExistsError, match="--overwrite"):
        pipeline.look(quartet, DATA, out=looked[1])
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="something else than a look"):
        pipeline.look(quartet, DATA, out=tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("place", ["collect", "write_look_page"])
def test_an_interrupted_look_leaves_nothing(quartet, monkeypatch, tmp_path, place, no_heads) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.look(quartet, ["embedded:code"], out=tmp_path / "look", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "numbers"), [("0-3,7", [0, 1, 2, 3, 7]), ("5", [5]), (" 2 , 4-4", [2, 4])])
def test_layers_are_read_from_ranges(text, numbers) -> None:
    assert layer_numbers(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-2", "1,,2"])
def test_other_words_are_no_layers(text) -> None:
    with pytest.raises(ValueError, match="0-11,20"):
        layer_numbers(text)


def test_the_command_writes_the_page_and_tells_the_findings(monkeypatch, tmp_path, capsys, no_heads) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["moestro", "look", "--data", "embedded:code", "--data", "notes=embedded:ui-en", "--tokens", "200"]
    monkeypatch.setattr("sys.argv", [*command, "--reference", "notes"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert (tmp_path / "quartet-look" / "look.html").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "Specialisation" in printed
    assert "quartet-look/look.html" in printed.replace("\n", "")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "--overwrite" in capsys.readouterr().err.replace("\n", " ")


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def large(quartet, tmp_path_factory):
    """The page of a model of random weights with 48 layers x 128 experts."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=6144, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=48,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16, num_experts=128, num_experts_per_tok=8,
        max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight)
    out = tmp_path_factory.mktemp("large") / "look"
    pipeline.look(model, DATA, tokenizer=quartet.tokenizer, out=out, **SMALL)
    return out / pipeline.PAGE


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine to draw the page")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def scrolled(browser, path, *, width=1280, scheme="light"):
    """(the page, scrolled through to its end and back; what it complained of; what it asked for)"""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.evaluate(
        """async () => {
          for (let y = 0; y < document.documentElement.scrollHeight; y += 700) {
            scrollTo({ top: y, behavior: "instant" });
            await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
          }
          await Promise.all(built.values());
          scrollTo({ top: 0, behavior: "instant" });
        }"""
    )
    return page, complaints, requests


def painted(page, selector):
    """Colours on the canvas of a figure that cover a cell at least."""
    return page.evaluate(
        """(selector) => {
          const canvas = document.querySelector(selector + " canvas");
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, seen = new Map();
          for (let i = 0; i < data.length; i += 4) {
            if (data[i + 3] < 255) continue;
            const colour = [data[i], data[i + 1], data[i + 2]].join();
            seen.set(colour, (seen.get(colour) || 0) + 1);
          }
          return [...seen].filter(([, pixels]) => pixels > 60).length;
        }""",
        selector,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_a_browser_draws_every_section(looked, browser, tmp_path, width, scheme) -> None:
    report, out = looked
    page, complaints, requests = scrolled(browser, out / pipeline.PAGE, width=width, scheme=scheme)
    assert complaints == []
    assert requests == [(out / pipeline.PAGE).as_uri()]
    assert page.locator("h2").all_inner_texts() == [*(s.title for s in report.sections), "How it was made"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert page.locator("figure[data-built=yes]").count() == len(report.figures)
    for figure in report.figures:
        if isinstance(figure, Heat):
            assert painted(page, f"#figure-{figure.name}") >= 3, f"{figure.name} is blank"
    shot = page.screenshot(full_page=True, path=tmp_path / "page.png")
    assert len(shot) > 100_000, "the screenshot is blank"
    page.close()


@pytest.mark.slow
def test_hover_and_arrow_keys_tell_the_values(looked, browser) -> None:
    report, out = looked
    page, complaints, _ = scrolled(browser, out / pipeline.PAGE)
    first = report.section("load").figures[0].table.row(0, named=True)
    said = f"tokens: {first['tokens']:,}"
    box = page.locator("#figure-load .scroll")
    box.focus()
    page.keyboard.press("ArrowRight")
    assert said in page.locator("#figure-load .readout").inner_text()
    page.keyboard.press("ArrowDown")
    assert "layer 1, expert 0" in page.locator("#figure-load .readout").inner_text()
    page.locator("#figure-load canvas").hover(position={"x": 55, "y": 42})
    tip = page.locator("#tip")
    assert "layer 0, expert 0" in tip.inner_text()
    assert said in tip.inner_text()
    page.locator("svg.layers .hit").first.hover()
    assert "entropy" in tip.inner_text()
    assert complaints == []
    page.close()


@pytest.mark.slow
def test_a_choice_holds_for_all_figures_of_its_section(looked, browser) -> None:
    report, out = looked
    page, complaints, _ = scrolled(browser, out / pipeline.PAGE)
    page.locator("#figure-specialisation select").select_option("sorting")
    assert page.locator("#figure-specialists select").input_value() == "sorting"
    (listing,) = (f for f in report.figures if isinstance(f, Listing) and f.name == "specialists")
    best = listing.table.filter(pl.col("domain") == "sorting").row(0, named=True)
    cells = page.locator("#figure-specialists tbody tr").first.locator("td").all_inner_texts()
    assert cells[:2] == [str(best["layer"]), str(best["expert"])]
    page.locator("#figure-specialisation .scroll").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#figure-specialisation .readout").inner_text().startswith("domain sorting, layer 0, expert 0")
    assert complaints == []
    page.close()


@pytest.mark.slow
def test_the_csv_of_a_figure_is_its_table(looked, browser, tmp_path) -> None:
    _, out = looked
    page, _, requests = scrolled(browser, out / pipeline.PAGE)
    for name in ("load", "specialists"):
        with page.expect_download() as download:
            page.locator(f'[data-csv="{name}"]').click()
        assert download.value.suggested_filename == f"{name}.csv"
        download.value.save_as(tmp_path / f"{name}.csv")
        found, wanted = pl.read_csv(tmp_path / f"{name}.csv"), pl.read_parquet(out / f"{name}.parquet")
        assert found.columns == wanted.columns
        for column in wanted.columns:
            if wanted[column].dtype.is_numeric():
                np.testing.assert_allclose(found[column].cast(pl.Float64), wanted[column], rtol=1e-3)
    assert all(url.startswith(("file:", "data:")) for url in requests)
    page.close()


@pytest.mark.slow
def test_the_page_of_a_large_model_opens_and_scrolls_quickly(large, browser) -> None:
    assert large.stat().st_size < LARGEST_PAGE
    seconds = []
    for _ in range(3):
        page, complaints, _ = scrolled(browser, large)
        assert complaints == []
        seconds.append(page.evaluate("performance.now()") / 1000)
        assert page.locator("*").count() < 8000, "too many elements for a page that scrolls quickly"
        assert painted(page, "#figure-load") >= 3
        page.locator("#figure-evenness summary").click()
        rows = page.locator("#figure-evenness tbody tr")
        rows.nth(2 * 48 - 1).wait_for()
        assert rows.count() == 2 * 48
        page.close()
    print(f"opened and scrolled through in {seconds} s, {large.stat().st_size:,} bytes")
    assert min(seconds) <= SECONDS, seconds
