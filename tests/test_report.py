"""The report page: one file, everything in it, nothing run that came from a model."""

import json
import os
import re
import shutil
import subprocess
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pytest

from moestro.fitting.result import Cost, Coverage, DomainLoss, FitReport, LayerChoice, Sample
from moestro.report import fit_page, write_fit_page
from moestro.report.figures import (
    change_text,
    loss_axis,
    mutual_information,
    ranges,
    served_by,
    signed,
    significant,
    size_text,
)
from moestro.report.fit_page import Change

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LARGEST_PAGE = 2_000_000
"""Bytes of the page for 48 layers x 128 experts x 15 domains."""
DOMAINS = (
    "code", "documentation", "german", "french", "spanish", "russian", "chinese", "japanese", "arithmetic", "sorting",
    "retrieval", "instructions", "science", "web", "english",
)  # fmt: skip
TASK = ("code", "documentation")
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
ATTACK = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&<b>'


def make_report(layers=6, experts=32, top_k=4, domains=DOMAINS, task=TASK, seed=0, **changes):
    """A report whose experts have favourite domains, as trained ones do."""
    rng = np.random.default_rng(seed)
    calibration = {name: int(rng.integers(3000, 6000)) for name in domains}
    choices, reached = [], []
    for layer in range(layers):
        sharpness = 0.4 + 1.6 * layer / max(1, layers - 1)
        affinity = rng.normal(size=(len(domains), experts)) * sharpness
        affinity[:, rng.choice(experts, max(1, experts // 24), replace=False)] = -40
        share = np.exp(affinity) / np.exp(affinity).sum(1, keepdims=True)
        for _ in range(20):  # no expert serves a token twice
            share = np.minimum(share, 0.9 / top_k)
            share /= share.sum(1, keepdims=True)
        tokens = [rng.multinomial(n * top_k, p).tolist() for n, p in zip(calibration.values(), share, strict=True)]
        wanted = [i for i, name in enumerate(domains) if name in task] or range(len(domains))
        served = np.array(tokens).sum(0)
        value = np.array(tokens)[list(wanted)].sum(0) * rng.uniform(0.5, 1.5, experts) * 1e-3
        kept = np.sort(np.argsort(-value, kind="stable")[: experts // 2])
        scores = [float(v) if n else None for v, n in zip(value, served, strict=True)]
        reached += served.tolist()
        choices.append(
            LayerChoice(
                layer=layer,
                num_experts=experts,
                top_k=top_k,
                kept=kept.tolist(),
                scores=scores,
                tokens=tokens,
                heldout_tokens=tokens,
            )
        )
    losses = []
    for name in domains:
        before = float(rng.uniform(0.8, 3.2))
        after = before + float(rng.uniform(0.01, 0.12) if name in task else rng.uniform(0.2, 1.4))
        losses.append(DomainLoss(domain=name, task=name in task, tokens=20_480, before=before, after=after))
    samples = [
        Sample(
            domain=name,
            prompt="def mean(values):\n    " if name == "code" else "Die Sitzung ist abgelaufen. Bitte",
            before="return sum(values) / len(values)",
            after="return sum(values) / max(1, len(values))",
            reference="return sum(values) / len(values)\n\n\ndef median(values):",
        )
        for name in domains[:8]
    ]
    unseen = sum(n == 0 for n in reached)
    record = {
        "model": "models/quartet",
        "request": "50%",
        "saliency": "easy-ep",
        "seed": 0,
        "calibration": calibration,
        "layers": choices,
        "coverage": Coverage(
            experts=len(reached),
            unseen=unseen,
            thin=sum(n < 200 for n in reached),
            needed=200,
            median_tokens=float(np.median(reached)),
        ),
        "losses": losses,
        "before": Cost(bytes=16_412_345, load_seconds=0.42, tokens_per_second=61.2),
        "after": Cost(bytes=9_103_200, load_seconds=0.31, tokens_per_second=66.9),
        "samples": samples,
        "warnings": [f"{unseen} experts saw no calibration token: add text, or keep more experts."],
        "date": datetime(2026, 11, 22, 0, 50, tzinfo=UTC),
        "versions": {"moestro": "0.1.0", "torch": "2.9.1", "transformers": "5.23.0", "python": "3.11.2"},
        "machine": "x86_64, 2 cores, 8 GB",
    }
    return FitReport(**record | changes)


UNTIMED = Cost(bytes=100, load_seconds=None, tokens_per_second=None)
STREAMED = {"before": UNTIMED, "after": UNTIMED, "samples": [], "streamed": True}


class Page(HTMLParser):
    """The page as elements, its text, and the tags that were not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.wrong, self.elements, self.parts = [], [], [], []
        self.feed(html)
        self.close()
        self.wrong += self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.parts.append((self.open[-1] if self.open else "", data))

    def text(self):
        shown = " ".join(data for tag, data in self.parts if tag not in {"script", "style"})
        return shown.replace("\u00a0", " ")

    def data(self):
        scripts = [data for tag, data in self.parts if tag == "script"]
        return json.loads(scripts[0])


def read(report, **kwargs):
    page = Page(fit_page(report, **kwargs))
    assert not page.wrong
    return page


def test_page_is_well_formed_and_ids_are_unique():
    page = read(make_report())
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"] for tag, attributes in page.elements if tag == "a"}
    assert links <= {f"#{name}" for name in ids}


def test_page_loads_nothing():
    html = fit_page(make_report())
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "img", "base"}
        assert not {"src", "srcset", "xlink:href", "onclick", "onload"} & set(attributes)
        assert tag == "a" or "href" not in attributes
    style = "".join(data for tag, data in page.parts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\(", html)
    assert "default-src 'none'" in html


def test_page_shows_every_domain_layer_and_number():
    report = make_report()
    text = read(report).text()
    for loss in report.losses:
        assert loss.domain in text
        assert f"{loss.before:.3f}" in text
        assert f"{loss.after:.3f}" in text
    for layer in report.layers:
        assert text.count(f"layer {layer.layer}") >= 2
        assert ranges(layer.kept) in text
    for name, tokens in report.calibration.items():
        assert f"{name} {tokens:,}" in text
    before, after = report.mean_loss(task=True)
    for needed in (
        "16.4 MB", "9.10 MB", f"{before:.3f}", f"{after:.3f}", "61.2", "66.9", "0.420 s", "easy-ep", "2026-11-22",
        "transformers 5.23.0", "x86_64, 2 cores", report.warnings[0], "96 of its 192 experts",
        "vllm serve", "convert_hf_to_gguf", "from_pretrained",
    ):  # fmt: skip
        assert needed in text


def test_embedded_numbers_are_the_report():
    report = make_report(layers=2)
    data = read(report).data()
    assert [d["name"] for d in data["domains"]] == list(report.calibration)
    assert [data["domains"][i]["task"] for i in data["order"]] == [True] * 2 + [False] * 13
    for drawn, layer in zip(data["layers"], report.layers, strict=True):
        assert drawn["tokens"] == layer.tokens
        assert drawn["kept"] == layer.kept
        assert drawn["unseen"] == [e for e, score in enumerate(layer.scores) if score is None]


def test_text_of_models_and_users_never_becomes_markup():
    plain = read(make_report(domains=("code", "web"), task=("code",)))
    losses = [
        DomainLoss(domain=ATTACK, task=True, tokens=9, before=1.0, after=1.1),
        DomainLoss(domain="web", task=False, tokens=9, before=1.0, after=1.1),
    ]
    report = make_report(
        domains=(ATTACK, "web"),
        task=(ATTACK,),
        losses=losses,
        model=f"org/{ATTACK}",
        request=ATTACK,
        saliency=ATTACK,
        warnings=[ATTACK],
        versions={ATTACK: ATTACK},
        machine=ATTACK,
        samples=[
            Sample(domain=ATTACK, prompt=ATTACK, before=ATTACK, after=f"{ATTACK}!", reference=f"\0\x1b[31m{ATTACK}")
        ],
    )
    html = fit_page(report, checkpoint=ATTACK)
    page = Page(html)
    assert not page.wrong
    assert ATTACK not in html
    count = lambda page, tag: sum(t == tag for t, _ in page.elements)  # noqa: E731
    assert count(page, "script") == count(plain, "script") == 2
    assert count(page, "img") == 0
    assert page.data()["domains"][0]["name"] == ATTACK
    assert "\0" not in html
    assert "\x1b" not in html
    assert page.text().count(ATTACK) >= 8


def test_an_expert_that_no_token_reached_is_unseen_whatever_its_score():
    layer = LayerChoice(
        layer=0, num_experts=2, top_k=1, kept=[0], scores=[0.3, 0.9], tokens=[[5, 0]], heldout_tokens=[[5, 0]]
    )
    page = read(
        make_report(domains=("code",), task=("code",), saliency="random").model_copy(update={"layers": [layer]})
    )
    assert page.data()["layers"][0]["unseen"] == [1]


def test_unseen_experts_are_their_own_state():
    layer = LayerChoice(
        layer=3,
        num_experts=4,
        top_k=1,
        kept=[0, 3],
        scores=[2.0, 1.0, None, None],
        tokens=[[9, 4, 0, 0]],
        heldout_tokens=[[9, 4, 0, 0]],
    )
    html = fit_page(make_report(domains=("code",), task=("code",)).model_copy(update={"layers": [layer]}))
    drawing = re.search(r'<svg id="map".*?</svg>', html, re.S).group()
    cells = {name: path.count("M") for name, path in re.findall(r'<path class="([a-z-]+)" d="([^"]*)"/>', drawing)}
    assert cells == {"kept": 2, "dropped": 1, "unseen": 1, "kept-unseen": 1}


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("no load time", {"before": Cost(bytes=100, load_seconds=None, tokens_per_second=3.0)}, "came from memory"),
        ("no samples", {"samples": []}, "No samples were generated"),
        ("streamed", STREAMED, "No samples were generated: the models were streamed"),
        ("streamed", STREAMED, "Generation, tokens per second not measured streamed from disk"),
        ("streamed", STREAMED, "Time to load not measured streamed from disk"),
        ("no warnings", {"warnings": []}, "No warnings."),
        ("no losses", {"losses": [], "layers": []}, "No held-out loss was measured"),
        ("grew", {"after": Cost(bytes=10**9, load_seconds=None, tokens_per_second=0.0)}, "still takes 1.00 GB"),
        ("empty", {"layers": [], "calibration": {}, "losses": [], "samples": []}, "No held-out tokens were counted"),
    ],
)
def test_page_says_what_is_missing(case, changes, words):
    assert words in " ".join(read(make_report().model_copy(update=changes)).text().split())


def test_page_without_rest_domains_and_with_one_domain():
    text = read(make_report(domains=TASK)).text()
    assert "only the task's domains were held out" in text
    assert "everything else" not in text
    text = read(make_report(domains=("code",), task=("code",))).text()
    assert "mutual information" not in text
    assert "one domain" in text


def test_page_without_task_domains():
    text = read(make_report(task=())).text()
    assert "what it cost is unknown" in text


def test_losses_that_are_not_finite_are_said_so():
    losses = [DomainLoss(domain="code", task=True, tokens=5, before=1.0, after=float("nan"))]
    losses += [DomainLoss(domain="web", task=False, tokens=5, before=1.0, after=float("inf"))]
    text = read(make_report(losses=losses)).text()
    assert "NaN" in text
    assert "∞" in text
    assert "could not be measured" in text


def test_layers_of_different_widths():
    wide, narrow = make_report(layers=1, experts=32), make_report(layers=1, experts=16)
    layers = [wide.layers[0], narrow.layers[0].model_copy(update={"layer": 1})]
    text = read(wide.model_copy(update={"layers": layers})).text()
    assert "16/32" in text
    assert "8/16" in text
    assert "different numbers of experts in different layers" in text


def test_large_models_stay_a_light_page():
    html = fit_page(make_report(layers=48, experts=128, top_k=8))
    assert len(html.encode()) < LARGEST_PAGE
    assert html.count("<") < 6000, "too many elements for a page that scrolls quickly"


def test_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_fit_page(make_report(), path)
    first = path.read_text(encoding="utf-8")
    assert first.startswith("<!DOCTYPE html>")

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_fit_page(make_report(seed=1), path)
    assert path.read_text(encoding="utf-8") == first
    assert os.listdir(tmp_path) == ["report.html"]


def test_loading_examples_name_the_checkpoint():
    text = read(make_report(), checkpoint="my models/fitted").text()
    assert 'from_pretrained("my models/fitted"' in text
    assert "vllm serve 'my models/fitted'" in text


def test_the_cost_in_plain_words():
    assert "11% less sure" in Change(2.0, 2.1).plainly
    assert "more sure" in Change(2.0, 1.9).plainly
    assert "as sure" in Change(2.0, 2.0).plainly
    assert "between 7.39 equally likely ones, where the original chose between 2.72" in Change(1.0, 2.0).plainly


def test_mutual_information_between_its_bounds():
    assert mutual_information([[5, 5], [50, 50]]) == pytest.approx(0)
    assert mutual_information([[7, 0], [0, 3]]) == pytest.approx(1)
    assert mutual_information([[1, 2, 3]]) is None
    assert mutual_information([[1, 2], [0, 0]]) is None
    assert mutual_information([]) is None
    counts = np.random.default_rng(0).integers(0, 50, (5, 9)).tolist()
    assert 0 < mutual_information(counts) < np.log2(5)
    assert mutual_information([counts[0], *([10 * n for n in row] for row in counts[1:])]) == pytest.approx(
        mutual_information(counts)
    )


def test_a_small_difference_looks_small():
    axis = loss_axis([1.235, 1.297])
    assert axis.at(1.297) - axis.at(1.235) < 10
    assert loss_axis([float("nan")]).at(0.5) == 50
    assert loss_axis([0.8, 4.1]).ticks == [0, 1, 2, 3, 4, 5]


def test_kept_experts_serve_all_or_none_of_the_routing():
    counts = [[3, 1, 0], [0, 2, 2]]
    assert served_by(counts, [0, 1, 2], [0, 1]) == pytest.approx(1)
    assert served_by(counts, [], [0, 1]) == 0
    assert served_by(counts, [0], [0, 1]) == pytest.approx(3 / 8)
    assert served_by([[0, 0, 0]], [0], [0]) is None


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (size_text(0), "0 bytes"),
        (size_text(999_999), "1.00 MB"),
        (size_text(13_840_000_000), "13.8 GB"),
        (significant(0.0999999), "0.100"),
        (significant(1234.5), "1,234"),
        (signed(-0.0001), "0.000"),
        (signed(-0.25), "−0.250"),
        (change_text(100, 45), "−55%"),
        (change_text(0, 45), ""),
        (ranges([0, 1, 2, 5, 7, 8]), "0–2, 5, 7–8"),
        (ranges([]), ""),
    ],
)
def test_numbers_read_well(found, expected):
    assert found.replace("\u00a0", " ") == expected


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine to draw the page")
@pytest.mark.parametrize(("layers", "experts", "top_k"), [(6, 32, 4), (48, 128, 8)])
def test_a_browser_draws_the_page(tmp_path, layers, experts, top_k):
    write_fit_page(make_report(layers=layers, experts=experts, top_k=top_k), tmp_path / "report.html")
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    browser += [f"--user-data-dir={tmp_path}/profile", "--window-size=1280,2000"]
    url = (tmp_path / "report.html").as_uri()
    dom = subprocess.run([*browser, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True)
    heat = re.search(r'<svg id="heat".*?</svg>', dom.stdout, re.S).group()
    assert heat.count("M") >= experts * len(DOMAINS), "the script drew no heat map"
    assert "CONSOLE" not in dom.stderr, "the browser complained"
    shot = tmp_path / "page.png"
    subprocess.run([*browser, f"--screenshot={shot}", url], capture_output=True, timeout=120, check=True)
    assert shot.stat().st_size > 50_000
