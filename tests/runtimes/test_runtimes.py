"""What moestro saves is what other programs read: each client in an environment of its own, measured on real loads.

Slow: environments are installed on first use (llama.cpp is built: ten minutes on two cores). `make runtimes` measures
all families; here are those that differ most in what a client has to know.
"""

from pathlib import Path

import pytest

from runtimes.environments import CannotInstall, install
from runtimes.page import NOTES, page, unexplained
from runtimes.run import CLIENTS, make_all

FAMILIES = ("quartet", "qwen3_moe", "deepseek_v3", "deepseek_v3, biases below 0", "gpt_oss", "phimoe")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    work = tmp_path_factory.mktemp("runtimes")
    return make_all(FAMILIES, work), work


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_computes_what_the_model_in_memory_computes(client: str, checkpoints) -> None:
    environment, measured = CLIENTS[client]
    try:
        install(environment)
    except CannotInstall as e:
        pytest.skip(f"{client} cannot be installed here: {e}")
    rows = measured(*checkpoints)
    assert rows
    assert not unexplained(rows)
    assert any(row.get("same") for row in rows if row["kind"] == "pruned")
    noted = {(r["client"], r["family"]) for r in rows if r.get("error") or r.get("same") is False}
    stale = {key for key in NOTES if key in {(r["client"], r["family"]) for r in rows}} - noted
    assert not stale, f"the page explains differences that are gone: {stale}"
    for row in rows:
        if "texts" in row:
            assert row["texts_tokenised_alike"] == row["texts"]
        if row["family"] == "quartet" and row["variant"] in ("f16", "q8_0"):
            assert row["kl"] < 2e-3


def test_the_page_names_every_client_that_was_measured(tmp_path: Path) -> None:
    row = {"client": "mlx-lm", "version": "1.2", "family": "olmoe", "kind": "pruned", "variant": "float32"}
    row |= {"log_probs": 2.0, "same": False, "error": None}
    text = page({"rows": [row], "not_installed": {"vLLM": "no wheel"}})
    assert "mlx-lm 1.2" in text
    assert "**2.00**" in text
    assert "vLLM (no wheel)" in text
    assert unexplained([row]) == [row]
