"""Minimal pairs: two prompts of equal length that differ in a word or two and so in their right answer.

    pairs = ioi_pairs(tokenizer, 100) | colored_objects_pairs(tokenizer, 100) | fact_pairs(tokenizer, facts, 100)

Indirect objects: "When Mary and John went to the store, John gave a drink to" goes on with the name that stands once;
in the corrupted prompt the other name is repeated. Coloured objects: three objects are listed with their colours and
one is asked for; the corrupted prompt asks for another. Facts (a control) are known by heart: the corrupted prompt asks
about another subject. Words that matter are one token each, which is checked for the tokenizer in use.

"Circuit Component Reuse Across Tasks in Transformer Language Models" (arXiv:2310.08744).
Shapes: B pairs, T positions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

NAMES = ("Mary", "John", "Tom", "James", "Dan", "Martin", "Amy", "Scott", "Kevin", "Paul", "Anna", "Jack", "Kate")
PLACES = ("store", "garden", "school", "house", "station", "office", "hospital", "restaurant")
GIFTS = ("drink", "book", "ring", "ball", "computer", "snack")
IOI_TEMPLATES = (
    "When{A} and{B} went to the{place},{S2} gave a{gift} to",
    "Then{A} and{B} had a long day at the{place}, and{S2} handed a{gift} to",
)
IOI_ROLES = {
    ("last", "IO"): "mover",
    ("last", "S2"): "inhibition",
    ("S2", "S1"): "duplicate token",
    ("S2", "after S1"): "induction",
}
"""{(query, key): what a head is called that attends so}"""

COLORS = ("red", "blue", "green", "white", "black", "brown", "orange", "purple")
OBJECTS = ("pen", "cup", "plate", "book", "ball", "ring", "key", "box", "lamp", "watch", "bag", "hat", "knife", "phone")
SURFACES = ("table", "desk", "floor", "bed", "shelf")
COLORED_ROLES = {
    ("last", "colour"): "mover",
    ("last", "asked"): "inhibition",
    ("last", "again"): "inhibition",
    ("last", "object"): "content gatherer",
    ("asked", "object"): "duplicate token",
    ("asked", "after object"): "induction",
    ("again", "object"): "duplicate token",
    ("again", "after object"): "induction",
}


class Wording(NamedTuple):
    """How coloured objects are told: {surface}, {color}, {object}, {asked}, each with no space before it.

    The question may name the object once more, as {again}."""

    opening: str = "Q: On the{surface}, I see"
    item: str = " a{color}{object}"
    next: str = ", a{color}{object}"
    last: str = ", and a{color}{object}"
    question: str = ". What color is the{asked}?\nA:"


WORDING = Wording()

Piece = str | tuple[str, str]
"""Text, or (name of a place, the one-token word that stands there)."""


@dataclass(frozen=True)
class MinimalPairs:
    """Prompts with padding on the right, and the tokens that follow them."""

    clean: Int[Tensor, "b t"]
    corrupted: Int[Tensor, "b s"]
    mask: Bool[Tensor, "b t"]
    answers: Int[Tensor, "b 2"]
    """Token that is right after the clean prompt, and the one that is right after the corrupted."""
    positions: dict[str, Int[Tensor, " b"]]
    """Named places of the clean prompt; "last" is its last token."""
    roles: dict[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.clean.shape != self.corrupted.shape:
            raise ValueError(
                f"clean prompts {tuple(self.clean.shape)} and corrupted {tuple(self.corrupted.shape)}: positions must "
                "correspond, so both need the same shape"
            )
        if not self.mask.any(dim=1).all() or (self.mask[:, 1:] & ~self.mask[:, :-1]).any():
            raise ValueError("padding must follow the prompts, and every prompt needs a token")
        self.positions["last"] = self.mask.sum(dim=1) - 1

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, chosen: slice) -> MinimalPairs:
        """Some of the pairs."""
        positions = {name: at[chosen] for name, at in self.positions.items()}
        clean, corrupted, mask, answers = (t[chosen] for t in (self.clean, self.corrupted, self.mask, self.answers))
        return MinimalPairs(clean, corrupted, mask, answers, positions, self.roles)


def pairs_of(
    tokenizer: Any,
    items: Sequence[tuple[Sequence[Piece], Sequence[Piece], str, str]],
    roles: Mapping[tuple[str, str], str] | None = None,
) -> MinimalPairs:
    """Pairs from (clean pieces, corrupted pieces, answer, foil), of which places and answers are single tokens.

    All items must name the same places. Raises ValueError for a word of several tokens, prompts of a pair that differ
    in length, and an answer that is its foil.
    """
    lead = list(tokenizer("")["input_ids"])
    clean, corrupted, answers = [], [], []
    places: dict[str, list[int]] = {}
    for pieces, other, answer, foil in items:
        ids, found = _assembled(tokenizer, lead, pieces)
        again, _ = _assembled(tokenizer, lead, other)
        if len(ids) != len(again):
            raise ValueError(f"a clean prompt of {len(ids)} tokens has a corrupted one of {len(again)}")
        if answer == foil:
            raise ValueError(f"the answer {answer!r} is right after both prompts of a pair")
        clean.append(ids)
        corrupted.append(again)
        answers.append([_single(tokenizer, answer), _single(tokenizer, foil)])
        for name, at in found.items():
            places.setdefault(name, []).append(at)
    if uneven := [name for name, at in places.items() if len(at) != len(items)]:
        raise ValueError(f"the place {uneven[0]!r} is named in {len(places[uneven[0]])} of {len(items)} pairs")
    length = max(map(len, clean))
    grid, other_grid = (
        torch.tensor([[*p, *[lead[0] if lead else 0] * (length - len(p))] for p in ps]) for ps in (clean, corrupted)
    )
    mask = torch.arange(length) < torch.tensor([len(p) for p in clean])[:, None]
    positions = {name: torch.tensor(at) for name, at in places.items()}
    return MinimalPairs(grid, other_grid, mask, torch.tensor(answers), positions, dict(roles or {}))


def ioi_pairs(
    tokenizer: Any,
    count: int,
    *,
    names: Sequence[str] = NAMES,
    places: Sequence[str] = PLACES,
    gifts: Sequence[str] = GIFTS,
    templates: Sequence[str] = IOI_TEMPLATES,
    seed: int = 0,
) -> MinimalPairs:
    """Indirect objects: in half the prompts the repeated name (S) comes second, in half first.

    Templates hold {A}, {B}, {place}, {S2} and {gift}, each with no space before it. Places: IO, S1, "after S1", S2.
    """
    _enough(names, 2, "names")
    rng = random.Random(f"ioi-{seed}")
    items = []
    for number in range(count):
        io, subject = rng.sample(list(names), 2)
        words = {"place": rng.choice(list(places)), "gift": rng.choice(list(gifts))}
        first, second = (("IO", io), ("S1", subject)) if number % 2 else (("S1", subject), ("IO", io))
        template = templates[number // 2 % len(templates)]
        clean, other = (
            _filled(template, {"A": first, "B": second, "S2": ("S2", again)}, words) for again in (subject, io)
        )
        items.append((clean, other, f" {io}", f" {subject}"))
    pairs = pairs_of(tokenizer, items, IOI_ROLES)
    pairs.positions["after S1"] = pairs.positions["S1"] + 1
    return pairs


def colored_objects_pairs(
    tokenizer: Any,
    count: int,
    *,
    colors: Sequence[str] = COLORS,
    objects: Sequence[str] = OBJECTS,
    surfaces: Sequence[str] = SURFACES,
    wording: Wording = WORDING,
    shots: int = 1,
    capital: bool = True,
    seed: int = 0,
) -> MinimalPairs:
    """Coloured objects with `shots` answered examples before the question.

    Places of the question: "colour" and "object" (what is asked for, where it is listed), "foil colour", "foil object"
    (what the corrupted prompt asks for), "third colour", "asked" (the object in the question; "again" where it is named
    twice), "after object".
    """
    _enough(colors, 3, "colors")
    _enough(objects, 3, "objects")
    rng = random.Random(f"coloured-{seed}")
    items = []
    for _ in range(count):
        example: list[Piece] = []
        for _ in range(shots):
            listed, which = _listed(rng, colors, objects, surfaces)
            example += _question(wording, listed, which, {})
            example += [f" {_answer(listed[1 + which][0], capital)}", "\n"]
        listed, which = _listed(rng, colors, objects, surfaces)
        foil = (which + rng.randrange(1, 3)) % 3
        names = {which: "", foil: "foil ", 3 - which - foil: "third "}
        clean, other = ([*example, *_question(wording, listed, asked, names)] for asked in (which, foil))
        answer, wrong = (f" {_answer(listed[1 + i][0], capital)}" for i in (which, foil))
        items.append((clean, other, answer, wrong))
    pairs = pairs_of(tokenizer, items, COLORED_ROLES)
    pairs.positions["after object"] = pairs.positions["object"] + 1
    return pairs


def fact_pairs(
    tokenizer: Any,
    facts: Mapping[str, str],
    count: int,
    *,
    template: str = "The capital of{subject} is",
    seed: int = 0,
) -> MinimalPairs:
    """Facts {subject: answer}; the corrupted prompt asks about a subject with another answer. Place: subject."""
    rng = random.Random(f"facts-{seed}")
    items = []
    for _ in range(count):
        subject = rng.choice(list(facts))
        others = [s for s in facts if facts[s] != facts[subject]]
        if not others:
            raise ValueError(f"all {len(facts)} facts have the answer {facts[subject]!r}; pairs need two")
        foil = rng.choice(others)
        clean, other = (_filled(template, {"subject": ("subject", s)}, {}) for s in (subject, foil))
        items.append((clean, other, f" {facts[subject]}", f" {facts[foil]}"))
    return pairs_of(tokenizer, items, {("last", "subject"): "reader of the subject"})


def single_token_words(tokenizer: Any, words: Sequence[str]) -> list[str]:
    """Those of the words that are one token with the space before them."""
    return [w for w in words if len(tokenizer(f" {w}", add_special_tokens=False)["input_ids"]) == 1]


def _listed(
    rng: random.Random, colors: Sequence[str], objects: Sequence[str], surfaces: Sequence[str]
) -> tuple[list[Any], int]:
    """(surface, then three (colour, object)), and which is asked for."""
    pairs = list(zip(rng.sample(list(colors), 3), rng.sample(list(objects), 3), strict=True))
    return [rng.choice(list(surfaces)), *pairs], rng.randrange(3)


def _question(wording: Wording, listed: Sequence[Any], asked: int, names: Mapping[int, str]) -> list[Piece]:
    """The pieces of one question, up to the answer; places are named where `names` is given."""
    surface, *pairs = listed
    pieces = _filled(wording.opening, {}, {"surface": surface})
    for i, (color, item) in enumerate(pairs):
        name = names.get(i)
        words = {"color": color, "object": item}
        places = {} if name is None else {"color": (f"{name}colour", color), "object": (f"{name}object", item)}
        pieces += _filled(wording.item if not i else wording.last if i == 2 else wording.next, places, words)
    item = pairs[asked][1]
    return [
        *pieces,
        *_filled(
            wording.question,
            {k: (k, item) for k in ("asked", "again")} if names else {},
            dict.fromkeys(("asked", "again"), item),
        ),
    ]


def _answer(color: str, capital: bool) -> str:
    return color.capitalize() if capital else color


def _filled(template: str, places: Mapping[str, tuple[str, str]], words: Mapping[str, str]) -> list[Piece]:
    """The template in pieces, {name} a piece of its own."""
    pieces: list[Piece] = []
    for part in template.replace("{", "\0{").replace("}", "}\0").split("\0"):
        name = part[1:-1]
        if part.startswith("{"):
            pieces.append(places[name] if name in places else f" {words[name]}")
        elif part:
            pieces.append(part)
    return pieces


def _assembled(tokenizer: Any, lead: list[int], pieces: Sequence[Piece]) -> tuple[list[int], dict[str, int]]:
    ids, places = list(lead), {}
    for piece in pieces:
        if isinstance(piece, tuple):
            places[piece[0]] = len(ids)
            ids.append(_single(tokenizer, f" {piece[1]}"))
        else:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids, places


def _single(tokenizer: Any, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens of this tokenizer, and must be one; choose other words")
    return ids[0]


def _enough(words: Sequence[str], needed: int, what: str) -> None:
    if len(set(words)) < needed:
        raise ValueError(f"{len(set(words))} different {what}; pairs need {needed}")
