"""Retrieval heads on a model that copies by hand, scores against hand-made ones, and needles in haystacks. fp32."""

import pytest
import torch
from torch import Tensor

import moestro
from copy_model import P, copy_model
from moestro.analyze.retrieval_heads import (
    Answers,
    NewestLook,
    RetrievalScores,
    _scored,
    answer_runs,
    masking,
    retrieval_scores,
    similarity,
)
from moestro.bundled import bundled_path
from moestro.data.needles import Needle, NeedleRun, code_needles, needle_runs
from moestro.view.heads import HeadMask
from moestro.view.layers import load_tokenizer
from tiny import make

COPIERS = {(1, 0), (1, 1)}


def run_of(number: int, *, length: int = 20, at: int = 4) -> NeedleRun:
    """A needle "key a b c d" in words that it does not hold, asked for by its key."""
    generator = torch.Generator().manual_seed(number)
    key, *rest = (torch.randperm(22, generator=generator) + 2).tolist()
    answer, hay = rest[:4], rest[4:7]
    filler = [hay[i % 3] for i in range(length - 7)]
    prompt = [1, *filler[:at], key, *answer, *filler[at:], key]
    return NeedleRun(tuple(prompt), tuple(answer), (at + 1, at + 6), 0.5, number)


RUNS = [*(run_of(n, at=2 + n) for n in range(4)), *(run_of(n, length=26) for n in range(4, 6))]


@pytest.fixture(scope="module")
def copier():
    return moestro.open(copy_model(), experts=False)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_copying_heads_are_found(copier, attention: str) -> None:
    copier.model.set_attn_implementation(attention)
    scores = retrieval_scores(copier, RUNS, max_new_tokens=4, progress=False)
    assert scores.answers.exact.all()
    assert scores.heads() == set(scores.top(2)) == COPIERS
    assert scores.mean[1].tolist() == scores.frequency[1].tolist() == [1, 1, 0]
    assert scores.mean[0].tolist() == [0, 0, 0]  # one back, and twice the first token
    assert scores.on_first[0].tolist() == [[0, 1, 1]] * 6
    assert scores.failures() == {}
    best = scores.table().row(0, named=True)
    assert (best["score"], best["low"], best["high"], best["frequency"]) == (1, 1, 1, 1)


def test_batches_and_their_order_make_no_difference(copier) -> None:
    whole = retrieval_scores(copier, RUNS, max_new_tokens=6, progress=False)
    alone = retrieval_scores(copier, RUNS[::-1], max_new_tokens=6, batch_tokens=1, progress=False)
    assert alone.answers.outputs[::-1] == whole.answers.outputs
    for layer in (0, 1):
        assert torch.equal(alone.per_run[layer].flip(0), whole.per_run[layer])
        assert torch.equal(alone.in_needle[layer].flip(0), whole.in_needle[layer])


def test_masking_names_what_the_answer_needs(copier) -> None:
    scores = retrieval_scores(copier, RUNS[:3], max_new_tokens=4, progress=False)
    (one, two) = masking(copier, RUNS[3:], scores, [1, 2], draws=2, max_new_tokens=4, progress=False)
    assert (two.count, two.drop().estimate) == (2, 1)
    assert one.drop().estimate == 0  # the other copies as well
    assert two.matched.shape == two.anywhere.shape == (2, 3)
    # of the three heads of layer 1 one is left, so a matched pair holds a copying head; elsewhere (0, 0) may be drawn
    found = {bool(answer_runs(copier, RUNS[3:], HeadMask(h, "uniform"), max_new_tokens=4, progress=False).exact.all())
             for h in ({(1, 0), (1, 2)}, {(1, 1), (1, 2)})}  # fmt: skip
    assert found == {True}
    assert two.drop("matched").estimate == 0


def test_failures_are_told_apart(copier) -> None:
    with copier.edits(HeadMask(COPIERS, "uniform")):
        scores = retrieval_scores(copier, RUNS, max_new_tokens=4, progress=False)
    assert not scores.answers.exact.any()
    with pytest.raises(ValueError, match="answers none of the 6 runs"):
        _ = scores.mean
    assert set(scores.failures({(0, 2)}).values()) == {"hallucination"}
    assert set(scores.failures({(0, 0)}).values()) == {"wrong place"}
    part = Answers(RUNS[:1], [[RUNS[0].answer[0], 0]])
    table = {0: torch.zeros(1, 1)}
    partly = RetrievalScores(part, 0.5, table, {0: table[0].bool()}, table, table)
    assert partly.failures({(0, 0)}) == {0: "incomplete"}


def test_the_score_counts_different_tokens_once() -> None:
    """Answer 7 8 9 at places 3 to 5; the model writes 7 7 8 5."""
    run = NeedleRun((1, 2, 6, 7, 8, 9, 2, 6), (7, 8, 9), (2, 6), 0.0, 0)
    looks = torch.tensor([[[3, 3, 0, 4], [3, 0, 0, 3], [4, 3, 0, 5], [2, 4, 0, 6]]])  # [B, T, A]
    found = _scored([run], [[7, 7, 8, 5]], looks, None)
    torch.testing.assert_close(found["score"], torch.tensor([[2 / 3, 1 / 3, 0, 1 / 3]]))
    assert found["copies"].tolist() == [[True, True, False, True]]
    assert found["first"].tolist() == [[0, 0.25, 1, 0]]
    assert found["inside"].tolist() == [[1, 0.75, 0, 0.75]]
    cut = _scored([run], [[7]], looks, None)  # what follows a stop token does not count
    torch.testing.assert_close(cut["score"], torch.tensor([[1 / 3, 1 / 3, 0, 0]]))
    assert _scored([run], [[7, 7, 8, 5]], looks, 5)["score"].isnan().all()
    assert not _scored([run], [[7, 7, 8, 5]], looks, 6)["score"].isnan().any()


def test_looks_merge_as_they_are_observed() -> None:
    view = moestro.open(make("qwen3_moe").model)
    batches = [torch.randint(2, 131, (2, n), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 7)]
    (whole,) = view.observe(batches, [NewestLook()], progress=False)
    parts = [NewestLook() for _ in range(2)]
    view.observe(batches[:1], [parts[0]], progress=False)
    view.observe(batches[1:], [parts[1]], progress=False)
    parts[0].merge(parts[1])
    for layer, looks in whole.items():
        assert len(looks) == 3
        assert all(torch.equal(a, b) for a, b in zip(looks, parts[0].result()[layer], strict=True))


def test_groups_take_the_best_of_their_heads() -> None:
    view = moestro.open(make("qwen3_moe").model)  # 6 query heads, 3 key-value heads
    scores = {i: torch.tensor([[0.1, 0.2, 0.0, 0.0, 0.9, 0.3]]) for i in range(3)}
    found = RetrievalScores(Answers(RUNS[:1], [list(RUNS[0].answer)]), 0.5, scores, {}, {}, {})
    torch.testing.assert_close(found.key_value_groups(view)[2], torch.tensor([0.2, 0.0, 0.9]))
    assert found.of([0]).mean[0].tolist() == scores[0][0].tolist()


def test_maps_are_compared_where_both_have_a_score() -> None:
    one = {0: torch.tensor([0.0, 1.0, 0.5, float("nan")]), 2: torch.tensor([0.2, 0.1])}
    two = {0: torch.tensor([0.1, 2.1, 1.1, 5.0]), 2: torch.tensor([0.5, 0.3])}
    r, p = similarity(one, two)
    assert r == pytest.approx(1)
    assert p < 0.05
    with pytest.raises(ValueError, match="different heads"):
        similarity(one, {0: one[0]})
    with pytest.raises(ValueError, match="a correlation needs three, and a spread"):
        similarity(one, {layer: torch.zeros_like(row) for layer, row in one.items()})


def test_bad_runs_are_refused(copier) -> None:
    with pytest.raises(ValueError, match="there are no runs"):
        retrieval_scores(copier, [])
    view = moestro.open(make("qwen3_moe").model)
    limit = view.model.config.max_position_embeddings
    long = NeedleRun((1,) * limit, (2, 3, 4), (1, 4), 0.0, 0)
    with pytest.raises(ValueError, match=f"come to {limit + 5}; the model has {limit} positions"):
        retrieval_scores(view, [long], max_new_tokens=5)
    assert max(r.length for r in RUNS) + 6 <= P


# Needles


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(bundled_path("quartet"))


TEXTS = ["The wind was cold. Nobody came to the harbour for days! Was it closed?\nIt had been open before. " * 12]


def test_needles_lie_where_it_is_said(tokenizer) -> None:
    needles = code_needles(tokenizer, 3, seed=4)
    runs = needle_runs(tokenizer, TEXTS, needles, lengths=(64, 100), depths=5, seed=1)
    assert [(r.number, r.length, r.depth) for r in runs] == [
        (n, length, d) for n in range(3) for length in (64, 100) for d in (0, 0.25, 0.5, 0.75, 1)
    ]
    for run in runs:
        needle = needles[run.number]
        start, end = run.needle
        assert tokenizer.decode(run.prompt[start:end]) == needle.before + needle.answer + needle.after
        assert tokenizer.decode(run.answer) == needle.answer
        assert tokenizer.decode(run.prompt).endswith(needle.question)
        assert not set(run.answer) & {*run.prompt[:start], *run.prompt[end:]}
        if 0 < run.depth < 1:
            assert tokenizer.decode(run.prompt[:start])[-1] in ".!?\n>"
    for start in range(0, len(runs), 5):
        places = [run.needle[0] for run in runs[start : start + 5]]
        assert places == sorted(places)
        assert len(set(places)) > 2
        assert runs[start].needle[0] == 1  # after the token that begins a text
    again = needle_runs(tokenizer, TEXTS, needles, lengths=(64, 100), depths=5, seed=1)
    assert again == runs


def test_sentences_that_give_the_answer_away_are_left_out(tokenizer) -> None:
    needle = Needle(" The code is", " river stone cloud", ".", "\nThe code is")
    texts = [" A river runs here. It is cold. " * 30]
    (run,) = needle_runs(tokenizer, texts, [needle], lengths=(40,), depths=1)
    assert "river runs" not in tokenizer.decode(run.prompt)


def test_bad_needles_are_refused(tokenizer) -> None:
    for needle, lengths, message in (
        (Needle(" It is", " river stone", ".", "\nIt is"), (40,), "has 2 different tokens"),
        (Needle(" It is", " river stone cloud", ".", " A cloud is"), (40,), "stand in its question"),
        (Needle(" It is", " river stone cloud", ".", "\nIt is"), (5,), "ask for longer prompts"),
        (Needle(" It is", " river stone cloud", ".", "\nIt is"), (5000,), "give more text"),
        (Needle(" It is", " river stone cloud", ".", "\nIt is"), (), "0 lengths"),
    ):
        with pytest.raises(ValueError, match=message):
            needle_runs(tokenizer, TEXTS, [needle], lengths=lengths)
    with pytest.raises(ValueError, match="give more words"):
        code_needles(tokenizer, 2, words=("river", "stone", "cloud"))


def test_codes_are_words_of_one_token(tokenizer) -> None:
    found: set[str] = set()
    for needle in code_needles(tokenizer, 8, tokens=4):
        ids = tokenizer(needle.answer, add_special_tokens=False)["input_ids"]
        assert len(set(ids)) == len(ids) == 4
        found.add(needle.answer)
    assert len(found) == 8
    assert [n.answer for n in code_needles(tokenizer, 2, seed=1)] != [n.answer for n in code_needles(tokenizer, 2)]


def test_generation_is_as_without_observing(copier) -> None:
    settings: dict[str, Tensor | int | bool] = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    ids = torch.tensor([RUNS[0].prompt])
    plain = copier.model.generate(ids, **settings)[0, ids.shape[1] :].tolist()
    scores = retrieval_scores(copier, RUNS[:1], max_new_tokens=5, progress=False)
    assert scores.answers.outputs == [plain]
    stopped = answer_runs(copier, RUNS[:1], max_new_tokens=5, stop=[RUNS[0].answer[2]], progress=False)
    assert stopped.outputs == [list(RUNS[0].answer[:2])]
    assert stopped.recall.tolist() == [0.5]
