"""The studio: what a click changes, what is traced, and the page in a real browser."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moestro
from moestro import SwitchOff
from moestro.steer.generation import generate, prompt_ids
from moestro.steer.router_steering import SoftSteer
from moestro.steer.steering import Steering
from moestro.studio import panels
from moestro.studio.app import Page
from moestro.studio.session import Switches, pieces, trace
from moestro.view.heads import HeadGain

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPT = "What is three plus four?"


@pytest.fixture(scope="module")
def view():
    return moestro.open("quartet")


def test_clicks_go_round() -> None:
    switches = Switches()
    seen = []
    for _ in range(3):
        switches = switches.clicked("expert", (2, 5))
        seen.append(dict(switches.experts))
    assert seen == [{(2, 5): "off"}, {(2, 5): "boost"}, {}]
    assert not switches


def test_switches_are_the_edits_they_say() -> None:
    switches = Switches({(2, 5): "off", (3, 1): "boost"}, {(0, 1): "off", (1, 2): "boost"})
    off, soft, heads = switches.edits()
    assert (type(off), off.ids) == (SwitchOff, {2: [5]})
    assert (type(soft), soft.ids) == (SoftSteer, {3: [1]})
    assert (type(heads), heads.gains) == (HeadGain, {(0, 1): 0.0, (1, 2): 2.0})
    assert switches.describe()[0] == "expert 5 of layer 2: off"


def test_a_trace_tells_the_experts_of_every_token(view) -> None:
    ids = prompt_ids(view, PROMPT)
    found = trace(view, ids, 3)
    assert "".join(found.tokens) == view.tokenizer.decode(ids[0])
    layer = view.layers[2]
    hidden: list[torch.Tensor] = []
    hook = layer.router.register_forward_hook(lambda _, args, out: hidden.append(out))
    with torch.no_grad():
        view.model(ids)
    hook.remove()
    _, weights, indices = hidden[0]
    expected = [[e for _, e in sorted(zip(w, i), reverse=True)] for w, i in zip(weights.tolist(), indices.tolist())]
    assert found.experts[2].tolist() == expected
    assert found.counts[2].sum() == pytest.approx(4.0)
    assert {len(norms) for norms in found.heads.values()} == set(view.num_heads.values())
    off = trace(view, ids, 3, edits=[SwitchOff({(2, e) for e in range(16)})])
    assert off.experts[2].min() >= 16


def test_pieces_stop_when_nobody_listens_and_failures_arrive(view) -> None:
    done: list[str] = []

    def endless(on_text: Any, stop: Any) -> None:
        while not stop():
            on_text("a")
        done.append("stopped")

    running = pieces(endless)
    assert next(running) == "a"
    running.close()
    assert done == ["stopped"]

    def failing(on_text: Any, stop: Any) -> None:
        on_text("a")
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        list(pieces(failing))
    text = list(pieces(lambda on_text, stop: generate(view, PROMPT, on_text=on_text, stop=stop, max_new_tokens=4)))[-1]
    assert text == generate(view, PROMPT, max_new_tokens=4)


def test_a_click_that_leaves_too_few_experts_is_refused(view) -> None:
    page = Page(view)
    switches = Switches({(2, e): "off" for e in range(28)})
    with pytest.raises(ValueError, match="leave at least 4 on"):
        page.click("expert:2:28", switches, None)
    assert page.click("token:7", switches, None) == (switches, 7)


def test_the_saved_file_steers_as_the_page_did(view) -> None:
    page = Page(view)
    with pytest.raises(ValueError, match="nothing is switched"):
        page.save(Switches())
    switches = Switches({(1, 5): "off", (3, 1): "boost"}, {(0, 1): "off"})
    *_, (plain, steered) = page.write(PROMPT, 8, 0.0, 0, True, switches)
    setup = Steering.load(page.save(switches))
    assert generate(view, PROMPT, steering=[setup], max_new_tokens=8) == steered
    assert generate(view, PROMPT, max_new_tokens=8) == plain


def test_panels_escape_what_models_write_and_mark_what_is_switched(view) -> None:
    ids = view.tokenizer("<script>alert(1)</script>", return_tensors="pt")["input_ids"]
    found = trace(view, ids, 1)
    assert "<script" not in panels.token_map(found) + panels.token_detail(found, 1, {})
    grid = panels.switch_grid("expert", {0: 3, 1: 2}, {(1, 1): "off"})
    assert grid.count("data-pick") == 5
    assert 'data-pick="expert:1:1" class="off"' in grid


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine to open the page")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def address() -> Iterator[str]:
    """A studio of quartet, started as a user starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from moestro.cli import main; main()", "studio", "--no-browser", "--port"]
    server = subprocess.Popen([*command, str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(600):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, server.stdout and server.stdout.read()
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def test_the_page_generates_switches_and_saves_in_a_browser(view, browser, address: str, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1300, "height": 1200})
    page.set_default_timeout(120_000)  # a busy machine draws the page slowly
    complaints: list[str] = []
    asked: set[str] = set()
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.add(request.url.split("/")[2]) if "//" in request.url else None)
    page.goto(f"http://{address}")
    page.fill("#prompt textarea", PROMPT)
    page.click("#generate")
    page.wait_for_selector("#map tr.made")
    assert page.input_value("#plain textarea") == generate(view, PROMPT, max_new_tokens=60)
    assert page.input_value("#steered textarea") == ""
    page.click("#map tr[data-pick='token:5']")
    page.wait_for_selector("#map tr.chosen")
    assert "token 5" in page.inner_text("#detail")
    expected = Switches()
    for pick in ("expert:2:5", "expert:3:7", "expert:3:7", "head:1:0"):
        unit, layer, number = pick.split(":")
        expected = expected.clicked(unit, (int(layer), int(number)))
        page.click(f"#{unit}s [data-pick='{pick}']")
        state = {**expected.experts, **expected.heads}[int(layer), int(number)]
        page.wait_for_selector(f"#{unit}s [data-pick='{pick}'].{state}")
    assert page.inner_text("#summary").splitlines() == expected.describe()
    page.click("#generate")
    page.wait_for_function("() => document.querySelector('#steered textarea').value !== ''")
    page.wait_for_timeout(500)
    with view.edits(*expected.edits()):
        assert page.input_value("#steered textarea") == generate(view, PROMPT, max_new_tokens=60)
    page.screenshot(path=tmp_path / "studio.png", full_page=True)
    assert (tmp_path / "studio.png").stat().st_size > 50_000
    with page.expect_download() as download:
        page.click("#save")
    setup = Steering.load(download.value.path())
    assert [e["kind"] for e in setup.edits] == ["switch_off", "soft_steer", "head_gain"]
    assert asked == {address}
    assert not complaints
    page.close()
