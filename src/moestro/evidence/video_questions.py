"""Generated questions about clips with a subtitle and a sound, where it is known which sources say the answer.

A clip shows four objects, one in each quarter, of different shapes, colours and directions of movement. A question
asks for the colour or the direction of one of them, or of a thing that is talked about and never shown, with four
choices. What is planted is which sources tell: the clip, the subtitle (it says so; else it chats, or speaks of another
thing), the sound (a tone whose pitch means the answer; else a hum). Where clip and subtitle are both needed, the
subtitle says which shape is asked about; where all three are, it leaves two, and the sound says which of them. `read`
answers by rules that read pictures, words and pitch; `Fusion` is a classifier that learns to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from moestro.analyze.questions import Question
from moestro.view.observe import progress_bar

SOURCES = ("video", "subtitle", "sound")
SHAPES = ("square", "ring", "cross", "plus", "bars")
THINGS = ("hat", "bag", "lamp", "door", "kite")
COLOURS = ("red", "green", "blue", "white")
DIRECTIONS = ("left", "right", "up", "down")
VALUES = COLOURS + DIRECTIONS
CHATTER = ("so nice to see you", "what a day it was", "we should go home now", "that is good news indeed")
WORDS = (
    "",
    *sorted(
        {*SHAPES, *THINGS, *VALUES, *" ".join(CHATTER).split(), "the", "is", "moves", "it", "or", "colour", "direction"}
    ),
)
KINDS = (
    "video",
    "subtitle",
    "video or subtitle",
    "video and subtitle",
    "unanswerable",
    "sound",
    "any of three",
    "all three",
)
"""What each question is planted to need."""

FRAMES, QUARTER, GLYPH = 8, 8, 4
SAMPLES, HUM = 64, (17, 20)
TITLE_WORDS = 7
RGB = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=np.uint8)
MASKS = np.array(
    [
        [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
        [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]],
        [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]],
        [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]],
        [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    ],
    dtype=bool,
)
PITCHES = {value: 3 + i for i, value in enumerate((*VALUES, "first", "second"))}
"""Cycles in a sound."""


class Scene(NamedTuple):
    """Of each quarter's object: numbers of its shape, colour and direction."""

    shapes: list[int]
    colours: list[int]
    directions: list[int]

    def says(self, shape: int, colours: bool) -> str:
        quarter = self.shapes.index(shape)
        return COLOURS[self.colours[quarter]] if colours else DIRECTIONS[self.directions[quarter]]


def generate(count: int, kinds: Sequence[str], seed: int) -> tuple[list[Question], list[str]]:
    """Questions, the kinds in turn, and the kind of each."""
    rng = np.random.default_rng(seed)
    planted = [kinds[i % len(kinds)] for i in range(count)]
    return [_question(f"{seed}-{i}", kind, rng) for i, kind in enumerate(planted)], planted


def _question(id: str, kind: str, rng: np.random.Generator) -> Question:
    scene = Scene(*(rng.permutation(n)[:4].tolist() for n in (len(SHAPES), 4, 4)))
    colours = bool(rng.integers(2))
    values = COLOURS if colours else DIRECTIONS
    shape = int(rng.choice(scene.shapes))
    shown = kind in ("video", "video or subtitle", "video and subtitle", "any of three", "all three")
    thing, other_thing = rng.permutation(THINGS)[:2].tolist()
    name = SHAPES[shape] if shown else thing
    value = scene.says(shape, colours) if shown else values[int(rng.integers(4))]
    subtitle, tone = _aside(other_thing, rng), int(rng.integers(*HUM))
    if kind in ("subtitle", "video or subtitle", "any of three"):
        subtitle = _statement(name, value)
    if kind in ("sound", "any of three"):
        tone = PITCHES[value]
    if kind == "video and subtitle":
        subtitle = f"it is the {name}"
    if kind == "all three":
        other = SHAPES[int(rng.choice([s for s in scene.shapes if s != shape]))]
        first = bool(rng.integers(2))
        subtitle = "it is the {} or the {}".format(*((name, other) if first else (other, name)))
        tone = PITCHES["first" if first else "second"]
    asked = "it" if kind in ("video and subtitle", "all three") else name
    choices = tuple(values[i] for i in rng.permutation(4).tolist())
    sources = {"video": _draw(scene, rng), "subtitle": subtitle, "sound": _sound(tone, rng)}
    return Question(id, f"{'colour' if colours else 'direction'} {asked}", sources, choices, choices.index(value))


def _statement(name: str, value: str) -> str:
    return f"the {name} {'is' if value in COLOURS else 'moves'} {value}"


def _aside(thing: str, rng: np.random.Generator) -> str:
    """A subtitle that does not matter."""
    if rng.integers(2):
        return CHATTER[int(rng.integers(len(CHATTER)))]
    return _statement(thing, VALUES[int(rng.integers(len(VALUES)))])


def _draw(scene: Scene, rng: np.random.Generator) -> UInt8[np.ndarray, "frames 16 16 3"]:
    clip = np.zeros((FRAMES, 2 * QUARTER, 2 * QUARTER, 3), dtype=np.uint8)
    for quarter, (shape, colour, direction) in enumerate(zip(*scene)):
        top, left = QUARTER * (quarter // 2), QUARTER * (quarter % 2)
        aside = int(rng.integers(QUARTER - GLYPH + 1))
        for frame in range(FRAMES):
            ahead = frame // 2 + int(rng.integers(2) if frame == FRAMES - 1 else 0)
            along = QUARTER - GLYPH - ahead if DIRECTIONS[direction] in ("left", "up") else ahead
            y, x = (aside, along) if DIRECTIONS[direction] in ("left", "right") else (along, aside)
            place = clip[frame, top + y : top + y + GLYPH, left + x : left + x + GLYPH]
            place[MASKS[shape]] = RGB[colour]
    return clip


def _sound(cycles: int, rng: np.random.Generator) -> Float[np.ndarray, " samples"]:
    phase = 2 * np.pi * (cycles * np.arange(SAMPLES) / SAMPLES + rng.random())
    return np.sin(phase) + rng.normal(0, 0.3, SAMPLES)


# Reading by rules


def read(questions: Sequence[Question]) -> list[int | None]:
    """The right choice where the sources tell it, and no answer where they do not."""
    replies = []
    for question in questions:
        said = _answer(question)
        replies.append(question.choices.index(said) if said in question.choices else None)
    return replies


def _answer(question: Question) -> str | None:
    attribute, name = question.text.split()
    words = question.sources.get("subtitle", "").split()
    tone = _pitch(question.sources["sound"]) if "sound" in question.sources else None
    if words and words[-1] in question.choices and name in words:
        return words[-1]
    if tone in question.choices:
        return tone
    if name == "it":
        named = [w for w in words if w in SHAPES]
        if len(named) == 2:
            named = [named[("first", "second").index(tone)]] if tone in ("first", "second") else []
        if not named:
            return None
        name = named[0]
    if name not in SHAPES or "video" not in question.sources:
        return None
    scene, shape = _scene(question.sources["video"]), SHAPES.index(name)
    return scene.says(shape, attribute == "colour") if shape in scene.shapes else None


def _pitch(sound: Float[np.ndarray, " samples"]) -> str | None:
    loudest = int(np.abs(np.fft.rfft(sound)).argmax())
    return next((value for value, cycles in PITCHES.items() if cycles == loudest), None)


def _scene(clip: UInt8[np.ndarray, "frames 16 16 3"]) -> Scene:
    found = []
    for quarter in range(4):
        top, left = QUARTER * (quarter // 2), QUARTER * (quarter % 2)
        part = clip[:, top : top + QUARTER, left : left + QUARTER]
        lit = np.asarray(part.any(axis=-1))
        (y0, x0), (y1, x1) = (np.argwhere(lit[frame]).min(axis=0).tolist() for frame in (0, -1))
        shape = int((lit[0, y0 : y0 + GLYPH, x0 : x0 + GLYPH] == MASKS).all(axis=(1, 2)).argmax())
        colour = int((part[0][lit[0]][0] == RGB).all(axis=1).argmax())
        moved = "left" if x1 < x0 else "right" if x1 > x0 else "up" if y1 < y0 else "down"
        found.append((shape, colour, DIRECTIONS.index(moved)))
    return Scene(*(list(column) for column in zip(*found)))


# A classifier that learns to read


class Fusion(nn.Module):
    """A clip encoder that describes each quarter, and a small transformer over the tokens of all sources.

    A source that is absent is zero, with a flag that says so.
    """

    def __init__(self, hidden: int = 64, layers: int = 2):
        super().__init__()
        pixels = FRAMES * QUARTER * QUARTER * 3
        self.eye = nn.Sequential(nn.Linear(pixels, 128), nn.GELU(), nn.Linear(128, len(SHAPES) + len(VALUES)))
        self.quarter = nn.Linear(len(SHAPES) + len(VALUES), hidden)
        self.word = nn.Embedding(len(WORDS), hidden)
        self.sound = nn.Linear(SAMPLES // 2 + 1, hidden)
        lengths = {"video": 4, "subtitle": TITLE_WORDS, "sound": 1, "question": 2}
        self.place = nn.Parameter(torch.randn(sum(lengths.values()), hidden) * 0.1)
        self.absent = nn.Parameter(torch.randn(len(SOURCES), hidden))
        self.owner: Tensor
        self.register_buffer("owner", torch.tensor([i for i, n in enumerate(lengths.values()) for _ in range(n)]))
        layer = nn.TransformerEncoderLayer(hidden, 4, 2 * hidden, 0.0, "gelu", batch_first=True, norm_first=True)
        self.mixer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, len(VALUES)))

    def describe(self, clips: UInt8[Tensor, "b 4 pixels"]) -> Float[Tensor, "b 4 c"]:
        """Logits of each quarter's shape, then its colour, then its direction."""
        return self.eye(clips.float() / 255)

    def forward(self, batch: dict[str, Tensor]) -> Float[Tensor, "b v"]:
        """`batch["seen"]` holds the descriptions as probabilities."""
        video, sound = self.quarter(batch["seen"]), self.sound(batch["sound"])[:, None]
        tokens = torch.cat([video, self.word(batch["subtitle"]), sound, self.word(batch["question"])], dim=1)
        there = F.pad(batch["there"], (0, 1), value=True)[:, self.owner, None]
        flags = F.pad(self.absent, (0, 0, 0, 1))[self.owner]
        mixed = self.mixer(torch.where(there, tokens, flags) + self.place)
        return self.head(mixed[:, -1])


PARTS = (len(SHAPES), len(COLOURS), len(DIRECTIONS))


def encode(questions: Sequence[Question], model: Fusion) -> dict[str, Tensor]:
    """What the transformer reads; sources that a question lacks are blank and marked so in "there" [B, 3]."""
    silent = np.zeros(SAMPLES)
    sounds = np.stack([q.sources.get("sound", silent) for q in questions])
    with torch.no_grad():
        described = model.describe(_quarters(questions)).split(PARTS, dim=2)
    return {
        "seen": torch.cat([part.softmax(dim=2) for part in described], dim=2),
        "subtitle": torch.tensor([_ids(q.sources.get("subtitle", ""), TITLE_WORDS) for q in questions]),
        "sound": torch.from_numpy(np.abs(np.fft.rfft(sounds))).float() / (SAMPLES / 2),
        "question": torch.tensor([_ids(q.text, 2) for q in questions]),
        "there": torch.tensor([[name in q.sources for name in SOURCES] for q in questions]),
        "choices": torch.tensor([[VALUES.index(c) for c in q.choices] for q in questions]),
        "answer": torch.tensor([q.answer for q in questions]),
    }


def _quarters(questions: Sequence[Question]) -> UInt8[Tensor, "b 4 pixels"]:
    dark = np.zeros((FRAMES, 2 * QUARTER, 2 * QUARTER, 3), dtype=np.uint8)
    clips = np.stack([q.sources.get("video", dark) for q in questions])
    parts = clips.reshape(-1, FRAMES, 2, QUARTER, 2, QUARTER, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    return torch.from_numpy(parts.reshape(len(questions), 4, -1))


def _ids(text: str, length: int) -> list[int]:
    ids = [WORDS.index(word) for word in text.split()]
    return ids + [0] * (length - len(ids))


def train(seed: int, *, steps: int, kinds: Sequence[str] = KINDS, count: int = 8192, progress: bool = True) -> Fusion:
    """A classifier trained on questions of its own: to describe clips, then to answer with some sources left out."""
    questions, _ = generate(count, kinds, seed=1_000 + seed)
    clips, scenes = _quarters(questions), torch.tensor([_scene(q.sources["video"]) for q in questions])
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = Fusion()

    def description_loss() -> Tensor:
        rows = torch.randint(count, (64,), generator=draw)
        said = model.describe(clips[rows]).split(PARTS, dim=2)
        pairs = zip(said, scenes[rows].unbind(dim=1))
        return torch.stack([F.cross_entropy(s.flatten(0, 1), t.flatten()) for s, t in pairs]).sum()

    def answer_loss() -> Tensor:
        rows = torch.randint(count, (128,), generator=draw)
        batch = {name: values[rows] for name, values in data.items()}
        batch["there"] = batch["there"] & (torch.rand(batch["there"].shape, generator=draw) > DROPPED)
        return F.cross_entropy(_choice_logits(model, batch), batch["answer"])

    with progress_bar(progress) as bar:
        task = bar.add_task(f"training classifier {seed}", total=EYE_STEPS + steps)
        advance = partial(bar.advance, task)
        _fit(list(model.eye.parameters()), description_loss, EYE_STEPS, advance)
        data = encode(questions, model)
        _fit([p for n, p in model.named_parameters() if not n.startswith("eye")], answer_loss, steps, advance)
    return model.eval()


EYE_STEPS, DROPPED, RATE = 200, 0.2, 3e-3


def _fit(parameters: list[nn.Parameter], loss: Callable[[], Tensor], steps: int, advance: Callable[[], None]) -> None:
    optimiser = torch.optim.AdamW(parameters, RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(steps):
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        advance()


def _choice_logits(model: Fusion, batch: dict[str, Tensor]) -> Float[Tensor, "b 4"]:
    return model(batch).gather(1, batch["choices"])


def answerer(model: Fusion) -> Callable[[Sequence[Question]], Any]:
    """The model as a function of questions: its probability of each choice."""

    @torch.no_grad()
    def answer(questions: Sequence[Question]) -> Any:
        return _choice_logits(model, encode(questions, model)).softmax(dim=1).numpy()

    return answer
