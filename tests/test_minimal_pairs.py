"""Minimal pairs: what they say, where their words stand, and what is refused. With the bundled tokenizer."""

import pytest
import torch

from moestro.bundled import bundled_path
from moestro.data.minimal_pairs import (
    MinimalPairs,
    Wording,
    colored_objects_pairs,
    fact_pairs,
    ioi_pairs,
    pairs_of,
    single_token_words,
)
from moestro.data.tasks import COLOURS, WORDS
from moestro.view.layers import load_tokenizer

PEOPLE = ("doctor", "teacher", "farmer", "sailor")
TEMPLATES = (
    "When the{A} and the{B} went to the{place}, the{S2} gave a{gift} to the",
    "The{A} and the{B} had a day at the{place}, and the{S2} handed a{gift} to the",
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(bundled_path("quartet"))


def ioi(tokenizer, count: int = 12, **more) -> MinimalPairs:
    given = dict(names=PEOPLE, places=("market", "city"), gifts=("lamp", "cup"), templates=TEMPLATES)
    return ioi_pairs(tokenizer, count, **{**given, **more})


def words(tokenizer, pairs: MinimalPairs, name: str, ids: torch.Tensor | None = None) -> list[str]:
    at = (pairs.clean if ids is None else ids)[torch.arange(len(pairs)), pairs.positions[name]]
    return [tokenizer.decode([i]).strip() for i in at.tolist()]


def test_the_corruption_repeats_the_other_name(tokenizer) -> None:
    pairs = ioi(tokenizer)
    io, first, again = (words(tokenizer, pairs, name) for name in ("IO", "S1", "S2"))
    assert first == again
    assert words(tokenizer, pairs, "S2", pairs.corrupted) == io
    assert [tokenizer.decode([i]).strip() for i in pairs.answers[:, 0].tolist()] == io
    assert [tokenizer.decode([i]).strip() for i in pairs.answers[:, 1].tolist()] == first
    differ = (pairs.clean != pairs.corrupted) & pairs.mask
    assert torch.equal(differ.nonzero()[:, 1], pairs.positions["S2"])
    assert (pairs.positions["IO"] < pairs.positions["S1"]).float().mean() == 0.5
    last = pairs.clean[torch.arange(12), pairs.positions["last"]].tolist()
    assert {tokenizer.decode([i]) for i in last} == {" the"}
    assert len(pairs.mask.sum(dim=1).unique()) == 2  # two templates, one of them padded
    assert torch.equal(ioi(tokenizer).clean, pairs.clean)
    assert not torch.equal(ioi(tokenizer, seed=1).clean, pairs.clean)


@pytest.mark.parametrize("shots", [0, 1, 2])
def test_the_colour_is_that_of_the_object_asked_for(tokenizer, shots: int) -> None:
    objects = single_token_words(tokenizer, WORDS)[:20]
    pairs = colored_objects_pairs(
        tokenizer, 10, colors=COLOURS, objects=objects, surfaces=("table",), shots=shots, capital=False
    )
    answer, foil = ([tokenizer.decode([i]).strip() for i in column] for column in pairs.answers.T.tolist())
    assert words(tokenizer, pairs, "colour") == answer
    assert words(tokenizer, pairs, "foil colour") == foil
    assert words(tokenizer, pairs, "object") == words(tokenizer, pairs, "asked")
    assert words(tokenizer, pairs, "foil object") == words(tokenizer, pairs, "asked", pairs.corrupted)
    assert torch.equal(pairs.positions["object"], pairs.positions["colour"] + 1)
    assert all(len({a, b, c}) == 3 for a, b, c in zip(answer, foil, words(tokenizer, pairs, "third colour")))
    text = tokenizer.decode(pairs.clean[0][pairs.mask[0]])
    assert text.count("What color is the") == text.count("A:") == shots + 1
    assert text.endswith("?\nA:")


def test_other_wordings_name_the_object_twice(tokenizer) -> None:
    item = " the{object} is{color}"
    wording = Wording("On the{surface},", item, f",{item}", f",{item}", ". What color is the{asked}?\nThe{again} is")
    pairs = colored_objects_pairs(
        tokenizer, 6, colors=COLOURS, objects=("cup", "key", "lamp"), surfaces=("table",), wording=wording, shots=1,
        capital=False,
    )  # fmt: skip
    assert words(tokenizer, pairs, "again") == words(tokenizer, pairs, "asked") == words(tokenizer, pairs, "object")
    assert (pairs.clean != pairs.corrupted).sum(dim=1).tolist() == [2] * 6
    last = tokenizer.decode(pairs.clean[0][pairs.mask[0]]).rsplit("On the", 1)[1]
    assert last.startswith(" table, the")
    assert last.endswith(f"The {words(tokenizer, pairs, 'asked')[0]} is")


def test_facts_are_asked_by_subject(tokenizer) -> None:
    facts = {"tiger": "river", "rabbit": "castle", "eagle": "river"}
    pairs = fact_pairs(tokenizer, facts, 20, template="The home of the{subject} is the")
    for n, subject in enumerate(words(tokenizer, pairs, "subject")):
        assert tokenizer.decode([int(pairs.answers[n, 0])]).strip() == facts[subject]
    assert (pairs.answers[:, 0] != pairs.answers[:, 1]).all()
    with pytest.raises(ValueError, match="all 2 facts have the answer 'river'"):
        fact_pairs(tokenizer, {"tiger": "river", "eagle": "river"}, 3)


def test_parts_keep_their_places(tokenizer) -> None:
    pairs = ioi(tokenizer)
    part = pairs[4:7]
    assert torch.equal(part.positions["S2"], pairs.positions["S2"][4:7])
    assert torch.equal(part.positions["last"], pairs.positions["last"][4:7])
    assert len(part) == 3


def test_pairs_that_do_not_correspond_are_refused(tokenizer) -> None:
    for items, message in (
        ([(["A", ("S", "tiger")], ["A", " big", ("S", "eagle")], " river", " stone")], "has a corrupted one of"),
        ([(["A"], ["B"], " river", " river")], "is right after both prompts"),
        ([(["A"], ["B"], " Constantinople", " river")], "tokens of this tokenizer, and must be one"),
        ([(["A", ("S", "Constantinople")], ["A"], " stone", " river")], "choose other words"),
        ([(["A", ("S", "tiger")], ["A", ("S", "eagle")], " stone", " river"), (["A"], ["B"], " stone", " river")],
         "'S' is named in 1 of 2 pairs"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pairs_of(tokenizer, items)
    with pytest.raises(ValueError, match="1 different names; pairs need 2"):
        ioi(tokenizer, names=("doctor",))
    with pytest.raises(ValueError, match="2 different colors; pairs need 3"):
        colored_objects_pairs(tokenizer, 2, colors=("red", "blue"))
    ids, mask = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="both need the same shape"):
        MinimalPairs(ids, ids[:, :3], mask, ids[:, :2], {})
    mask[0, 0] = False
    with pytest.raises(ValueError, match="padding must follow"):
        MinimalPairs(ids, ids, mask, ids[:, :2], {})
