"""Importance of sources by its definition, the types it gives, and what permuting a source does to them."""

import itertools
import json

import numpy as np
import polars as pl
import pytest

from moestro.analyze import modality_importance as mi
from moestro.analyze.questions import Question, ask, exact, probability
from moestro.evidence import modality_bias as evidence
from moestro.evidence import video_questions

PAIR, TRIO = ("video", "subtitle"), ("video", "subtitle", "sound")
TABLE = {  # (c_V, c_T, c_VT): (MIS_V, MIS_T, type), worked out by hand
    (0, 0, 0): (0, 0, mi.INCORRECT),
    (0, 1, 0): (-1, 0, "subtitle"),
    (1, 0, 0): (0, -1, "video"),
    (1, 1, 0): (-1, -1, mi.NONE),
    (0, 0, 1): (1, 1, mi.COMPLEMENTARY),
    (0, 1, 1): (0, 1, "subtitle"),
    (1, 0, 1): (1, 0, "video"),
    (1, 1, 1): (0, 0, mi.CORRECT),
}


def scores_of(rows, sources=PAIR) -> mi.SubsetScores:
    members = [c for n in range(1, len(sources) + 1) for c in itertools.combinations(range(len(sources)), n)]
    members = np.array([[j in c for j in range(len(sources))] for c in members])
    rows = np.array(rows, dtype=float)
    ids = tuple(map(str, range(len(rows))))
    return mi.SubsetScores(sources, ids, members, rows, np.zeros(len(rows)), False)


def when(*sets: str) -> str:
    """The text of a question that each of these sets of sources is enough to answer."""
    return "|".join(sets)


def questions(needs, sources=PAIR, copies=4) -> list[Question]:
    """Questions whose sources all say the right answer; their text tells the oracle which sets it needs."""
    made = []
    for number, (text, copy) in enumerate(itertools.product(needs, range(copies))):
        right = f"answer {copy % 3}"
        choices = tuple(f"answer {i}" for i in range(3))
        held = dict.fromkeys(sources, right)
        made.append(Question(f"q{number}", text, held, choices, choices.index(right)))
    return made


def oracle(asked) -> list[int | None]:
    """The right choice where a set that is enough agrees on it, and no answer otherwise."""
    replies = []
    for q in asked:
        reply = None
        for enough in filter(None, map(str.split, q.text.split("|"))):
            said = {q.sources[name] for name in enough if name in q.sources}
            if set(enough) <= q.sources.keys() and len(said) == 1:
                reply = q.choices.index(said.pop())
        replies.append(reply)
    return replies


def test_two_sources_give_the_papers_table() -> None:
    scores = scores_of(list(TABLE))
    expected = [row[:2] for row in TABLE.values()]
    np.testing.assert_array_equal(mi.modality_importance(scores), expected)
    assert mi.question_types(scores) == [row[2] for row in TABLE.values()]


def test_three_sources_by_hand() -> None:
    #        v  t  a  vt va ta vta     v alone; redundant v, t; pair v + t; all three; whatever
    rows = [[1, 0, 0, 1, 1, 0, 1], [1, 1, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 1], [0] * 6 + [1], [1] * 7]
    importance = mi.modality_importance(scores_of(rows, TRIO))
    third = 1 / 3
    by_hand = [[1, 0, 0], [third, third, 0], [2 * third, 2 * third, 0], [third] * 3, [0, 0, 0]]
    np.testing.assert_allclose(importance, by_hand, atol=1e-12)
    types = mi.question_types(scores_of(rows, TRIO))
    assert types == ["video", mi.NONE, mi.NONE, mi.COMPLEMENTARY, mi.CORRECT]


def test_a_margin_turns_guesses_into_misses() -> None:
    guessing = scores_of([[0.95, 0.25, 0.97], [0.3, 0.25, 0.9], [0.2, 0.3, 0.25], [0.9, 0.8, 0.95]])
    assert mi.question_types(guessing, margin=0.375) == ["video", mi.COMPLEMENTARY, mi.INCORRECT, mi.CORRECT]
    assert mi.question_types(guessing) == [mi.COMPLEMENTARY, mi.COMPLEMENTARY, "subtitle", mi.COMPLEMENTARY]
    three = scores_of([[0.25, 0.22, 0.28, 0.5, 0.25, 0.25, 0.97], [0.99, 0.3, 0.2, 0.95, 0.99, 0.25, 0.98]], TRIO)
    assert mi.question_types(three, margin=0.375) == [mi.COMPLEMENTARY, "video"]
    with pytest.raises(ValueError, match=r"margin=0.5"):
        mi.question_types(guessing, margin=0.5)


@pytest.mark.parametrize(
    ("sources", "needs", "types"),
    [
        (
            PAIR,
            [when("video"), when("subtitle"), when("video", "subtitle"), when("video subtitle"), when()],
            ["video", "subtitle", mi.CORRECT, mi.COMPLEMENTARY, mi.INCORRECT],
        ),
        (
            TRIO,
            [when("sound"), when("video", "subtitle", "sound"), when("video subtitle sound"), when("video subtitle")],
            ["sound", mi.CORRECT, mi.COMPLEMENTARY, mi.NONE],
        ),
    ],
)
def test_what_a_question_needs_is_found_again(sources, needs, types) -> None:
    asked = questions(needs, sources)
    scores = mi.ask_subsets(asked, oracle, progress=False)
    assert mi.question_types(scores) == [t for t in types for _ in range(4)]
    assert scores.sources == sources
    assert scores.of(*sources).tolist() == scores.scores[:, -1].tolist()
    assert not scores.sampled


def test_absent_sources_leave_no_trace_and_the_bare_question_is_asked_too() -> None:
    seen = set()

    def answer(asked):
        seen.update(frozenset(q.sources) for q in asked)
        return [q.answer if not q.sources else None for q in asked]

    scores = mi.ask_subsets(questions([when()]), answer, progress=False)
    assert seen == {frozenset(), *map(frozenset, ({"video"}, {"subtitle"}, PAIR))}
    assert scores.question_only.tolist() == [1.0] * 4
    assert scores.scores.sum() == 0


def test_repeats_shuffle_choices_alike_for_all_subsets() -> None:
    orders: dict[tuple[str, frozenset[str]], list] = {}

    def answer(asked):
        for q in asked:
            orders.setdefault((q.id, frozenset(q.sources)), []).append(q.choices)
            assert q.choices[q.answer] == q.right
        return [0] * len(asked)  # always the first choice

    scores = mi.ask_subsets(questions([when("video")]), answer, repeats=30, progress=False)
    for id in {id for id, _ in orders}:
        assert len({tuple(o) for (i, _), o in orders.items() if i == id}) == 1
    assert len({tuple(c) for c in orders["q0", frozenset()]}) > 2
    assert np.abs(scores.scores - 1 / 3).max() < 0.3  # a fixed place is no better than a guess
    assert mi.question_types(scores) == [mi.AGNOSTIC] * 4


def test_a_cache_goes_on_where_asking_stopped(tmp_path) -> None:
    asked, calls, path = questions([when("video"), when("subtitle")]), [], tmp_path / "scores.jsonl"

    def dying(batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise ConnectionError
        return oracle(batch)

    with pytest.raises(ConnectionError):
        mi.ask_subsets(asked, dying, cache=path, progress=False)
    path.write_text(path.read_text() + '["q0", ["vid')  # cut off while it was written
    done = mi.ask_subsets(asked, dying, cache=path, progress=False)
    assert sum(calls) == 8 * 4 + 8  # four subsets of eight questions, and the batch that failed
    np.testing.assert_array_equal(done.scores, mi.ask_subsets(asked, oracle, progress=False).scores)
    again = mi.ask_subsets(asked, lambda _: pytest.fail("asked again"), cache=path, progress=False)
    np.testing.assert_array_equal(done.scores, again.scores)
    assert all(map(json.loads, path.read_text().splitlines()))
    with pytest.raises(ValueError, match="name another file"):
        mi.ask_subsets(asked, oracle, cache=path, repeats=2, progress=False)


def test_many_sources_are_sampled_on_demand_only() -> None:
    sources = tuple(f"retriever-{i}" for i in range(8))
    asked = questions([when("retriever-3")], sources)
    with pytest.raises(ValueError, match="8 sources have 255 subsets"):
        mi.ask_subsets(asked, oracle, progress=False)
    scores = mi.ask_subsets(asked, oracle, max_subsets=60, progress=False)
    assert scores.sampled
    assert scores.members.shape == (60, 8)
    assert len({tuple(row) for row in scores.members.tolist()}) == 60
    ranked = mi.mean_importance(scores)
    assert next(iter(ranked)) == "retriever-3"
    assert ranked["retriever-3"].estimate == 1.0
    assert max(abs(i.estimate) for name, i in ranked.items() if name != "retriever-3") < 0.5
    with pytest.raises(ValueError, match="max_subsets=1 is too few"):
        mi.ask_subsets(asked, oracle, max_subsets=1, progress=False)


def test_probabilities_score_a_guess_as_a_guess() -> None:
    q = Question("q", "?", {}, ("a", "b", "c"), 1)
    assert exact(q, [0.2, 0.5, 0.3]) == 1.0 == exact(q, 1)
    assert exact(q, [0.6, 0.1, 0.3]) == 0.0 == exact(q, None)
    assert probability(q, [0.2, 0.5, 0.3]) == 0.5


def test_shares_by_group_have_intervals_also_where_none_occurs() -> None:
    types = ["video"] * 6 + ["subtitle"] * 4
    report = mi.modality_report(types, groups=["a"] * 6 + ["b"] * 4)
    row = report.row(by_predicate=(pl.col("group") == "b") & (pl.col("type") == "video"), named=True)
    assert (row["questions"], row["share"], row["low"]) == (0, 0.0, 0.0)
    assert 0.3 < row["high"] < 0.6
    whole = report.filter(report["group"] == "all")
    assert dict(zip(whole["type"], whole["share"])) == {"video": 0.6, "subtitle": 0.4}
    with pytest.raises(ValueError, match="1 groups for 10 questions"):
        mi.modality_report(types, groups=["a"])


def test_permuting_the_source_that_matters_costs_the_answers() -> None:
    asked = questions([when("video"), when("subtitle"), when("video", "subtitle")], copies=6)
    types = mi.question_types(mi.ask_subsets(asked, oracle, progress=False))
    drops = mi.permutation_drops(asked, oracle, types=types, seeds=3, progress=False)
    found = {(row["type"], row["source"]): row for row in drops.iter_rows(named=True)}
    assert found["video", "video"]["drop"] == found["subtitle", "subtitle"]["drop"] == 1.0
    assert found["video", "subtitle"]["drop"] == found["subtitle", "video"]["drop"] == 0.0
    assert {row["questions"] for row in found.values()} == {6}
    assert all(row["low"] <= row["drop"] <= row["high"] for row in found.values())
    whole = mi.permutation_drops(asked, oracle, seeds=3, progress=False)
    assert whole["type"].to_list() == ["all", "all"]


def test_donors_are_others_with_another_answer() -> None:
    asked = questions([when("video")], copies=7)
    drawn = [mi.donors(asked, seed) for seed in range(20)]
    for row in drawn:
        assert all(asked[i].right != asked[d].right for i, d in enumerate(row))
    assert len({tuple(row) for row in drawn}) > 1
    assert np.array_equal(mi.donors(asked, 4), drawn[4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: mi.ask_subsets([], oracle), "no questions"),
        (lambda q: mi.ask_subsets(q, oracle, sources=["video"]), "two different ones or more"),
        (lambda q: mi.ask_subsets(q, oracle, sources=["video", "smell"]), "'q0' has no source 'smell'"),
        (lambda q: mi.ask_subsets([q[0], q[0]], oracle), "as 'q0'"),
        (lambda q: mi.ask_subsets(q, oracle, repeats=0), "repeats=0"),
        (lambda q: mi.ask_subsets(q, oracle, score=lambda *_: 2.0), "a score of 2.0"),
        (lambda q: mi.ask_subsets(q, lambda batch: [0]), "1 replies to 4 questions"),
        (lambda q: mi.ask_subsets([q[0].given("none", 1)], oracle), "cannot be called 'none'"),
        (lambda q: mi.permutation_drops(q[:1], oracle), "two or more"),
        (lambda q: mi.permutation_drops([q[0], q[3]], oracle), "have the answer 'answer 0'"),
        (lambda q: mi.permutation_drops(q, oracle, types=["a"]), "1 types for 4 questions"),
        (lambda q: mi.permutation_drops(q, oracle, seeds=0), "seeds=0"),
        (lambda q: scores_of([[0, 0, 1]]).of("smell"), "was not asked"),
        (lambda q: mi.modality_report([]), "no types to report"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(questions([when("video")]))


@pytest.mark.parametrize(
    ("sources", "types"), [(evidence.TWO, evidence.PLANTED_TWO), (evidence.THREE, evidence.PLANTED_THREE)]
)
def test_generated_questions_need_what_they_are_planted_to_need(sources, types) -> None:
    asked, planted = video_questions.generate(10 * len(types), [*types], seed=5)
    scores = mi.ask_subsets(asked, video_questions.read, sources=sources, progress=False)
    assert mi.question_types(scores) == [types[kind] for kind in planted]
    again, _ = video_questions.generate(10 * len(types), [*types], seed=5)
    assert all(np.array_equal(a.sources["video"], b.sources["video"]) for a, b in zip(asked, again))


def test_the_trained_answerer_sees_only_what_it_is_given() -> None:
    asked, _ = video_questions.generate(8, video_questions.KINDS, seed=6)
    answer = video_questions.answerer(video_questions.Fusion())
    others = [q.given("video", donor.sources["video"]) for q, donor in zip(asked, asked[1:] + asked[:1])]
    same, other = (answer([q.only(["subtitle"]) for q in questions]) for questions in (asked, others))
    np.testing.assert_array_equal(same, other)
    assert not np.array_equal(answer(asked), answer(others))
    np.testing.assert_allclose(answer(asked).sum(axis=1), 1, atol=1e-5)


def test_replies_come_in_the_questions_order() -> None:
    asked = questions([when("video")], copies=5)
    got = list(ask(asked, lambda batch: [q.id for q in batch], batch_size=2, progress=False))
    assert [(q.id, reply) for q, reply in got] == [(q.id, q.id) for q in asked]
