"""Generated tasks with exact answers: arithmetic, sorting, retrieval and chat-style instructions.

Every generator is a pure function `(seed, n) -> list[Problem]`; the same seed gives the same problems. Prompt
and answer are separate, so that a model can be scored by exact match on what it writes after the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"

WORDS = tuple(
    [
        "apple",
        "river",
        "stone",
        "cloud",
        "table",
        "green",
        "window",
        "garden",
        "silver",
        "music",
        "paper",
        "ocean",
        "bridge",
        "candle",
        "winter",
        "summer",
        "forest",
        "mountain",
        "yellow",
        "orange",
        "purple",
        "lemon",
        "tiger",
        "rabbit",
        "eagle",
        "horse",
        "spider",
        "dragon",
        "planet",
        "rocket",
        "engine",
        "pencil",
        "market",
        "village",
        "castle",
        "island",
        "desert",
        "valley",
        "thunder",
        "shadow",
        "mirror",
        "ladder",
        "button",
        "pocket",
        "basket",
        "bottle",
        "hammer",
        "needle",
        "carpet",
        "pillow",
        "blanket",
        "kettle",
        "butter",
        "pepper",
        "sugar",
        "honey",
        "cherry",
        "banana",
        "carrot",
        "potato",
        "tomato",
        "onion",
        "garlic",
        "cheese",
        "bread",
        "coffee",
        "water",
        "juice",
        "doctor",
        "teacher",
        "farmer",
        "driver",
        "sailor",
        "painter",
        "singer",
        "writer",
        "friend",
        "sister",
        "brother",
        "mother",
        "father",
        "child",
        "number",
        "letter",
        "word",
        "story",
        "picture",
        "camera",
        "radio",
        "clock",
        "watch",
        "chair",
        "door",
        "floor",
        "wall",
        "roof",
        "street",
        "city",
        "road",
        "train",
        "plane",
        "ship",
        "boat",
        "wheel",
        "key",
        "lock",
        "chain",
        "rope",
        "knife",
        "spoon",
        "fork",
        "plate",
        "cup",
        "glass",
        "bowl",
        "lamp",
        "light",
        "fire",
        "smoke",
        "ash",
        "sand",
        "snow",
        "rain",
        "wind",
        "storm",
        "star",
        "moon",
        "sun",
        "sky",
        "grass",
        "leaf",
        "tree",
        "root",
        "seed",
        "flower",
        "fruit",
        "bird",
        "fish",
        "whale",
        "shark",
        "frog",
        "snake",
        "mouse",
        "goat",
        "sheep",
        "cow",
        "wolf",
        "bear",
        "fox",
        "deer",
        "cat",
        "dog",
    ]
)
COLOURS = ("red", "blue", "green", "white", "black", "brown", "pink", "grey")
NAMES = ("Ana", "Ben", "Cara", "Dan", "Eva", "Finn", "Gita", "Hugo", "Ines", "Jan", "Kofi", "Lena", "Mia", "Noor")


class Problem(NamedTuple):
    """A task instance: `answer` is what an exact solver writes after `prompt`.

    An answer brings the space that separates it: tokenizers join a word to the space before it, so a prompt that ends
    in a space would not be how the text is read in training.
    """

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer


def arithmetic(seed: int, n: int) -> list[Problem]:
    """Sums, differences, products and comparisons of small numbers: `17 + 25 =` -> ` 42`."""
    rng = random.Random(f"arithmetic-{seed}")
    return [_arithmetic(rng) for _ in range(n)]


def _arithmetic(rng: random.Random) -> Problem:
    top = rng.choice((10, 100, 100, 1000))
    a, b = rng.randrange(top), rng.randrange(top)
    kind = rng.choice(("+", "+", "-", "-", "*", "max", "min"))
    if kind == "+":
        return Problem(f"{a} + {b} =", f" {a + b}")
    if kind == "-":
        a, b = max(a, b), min(a, b)
        return Problem(f"{a} - {b} =", f" {a - b}")
    if kind == "*":
        a, b = rng.randrange(2, 13), rng.randrange(2, 100)
        return Problem(f"{a} * {b} =", f" {a * b}")
    return Problem(f"{kind}({a}, {b}) =", f" {max(a, b) if kind == 'max' else min(a, b)}")


def sorting(seed: int, n: int) -> list[Problem]:
    """Lists of numbers or words to put in order: `sort: 7 2 9 ->` -> ` 2 7 9`."""
    rng = random.Random(f"sorting-{seed}")
    return [_sorting(rng) for _ in range(n)]


def _sorting(rng: random.Random) -> Problem:
    length = rng.randrange(3, 9)
    if rng.random() < 0.6:
        items = [str(v) for v in sorted(rng.sample(range(100), length))]
    else:
        items = sorted(rng.sample(WORDS, length))
    shuffled = rng.sample(items, length)
    if rng.random() < 0.75:
        return Problem(f"sort: {' '.join(shuffled)} ->", " " + " ".join(items))
    return Problem(f"reverse: {' '.join(shuffled)} ->", " " + " ".join(reversed(shuffled)))


def retrieval(seed: int, n: int) -> list[Problem]:
    """Look up a value among key-value pairs, or copy a line: `... ? garden =` -> ` 417`."""
    rng = random.Random(f"retrieval-{seed}")
    return [_retrieval(rng) for _ in range(n)]


def _retrieval(rng: random.Random) -> Problem:
    if rng.random() < 0.3:
        items = [rng.choice((rng.choice(WORDS), str(rng.randrange(1000)))) for _ in range(rng.randrange(3, 10))]
        return Problem(f"copy: {' '.join(items)} |", " " + " ".join(items))
    keys = rng.sample(WORDS, rng.randrange(3, 10))
    values = [rng.choice((rng.choice(COLOURS), str(rng.randrange(1000)))) for _ in keys]
    pick = rng.randrange(len(keys))
    pairs = ", ".join(f"{key} = {value}" for key, value in zip(keys, values, strict=True))
    return Problem(f"{pairs} ? {keys[pick]} =", f" {values[pick]}")


def instructions(seed: int, n: int) -> list[Problem]:
    """One user turn and its answer in the chat format of the bundled models."""
    rng = random.Random(f"instructions-{seed}")
    return [chat(*_instruction(rng)) for _ in range(n)]


def chat(question: str, answer: str) -> Problem:
    """The bundled tokenizer's chat template applied to one exchange."""
    return Problem(f"{USER}{question}{END}\n{ASSISTANT}", f"{answer}{END}")


def _instruction(rng: random.Random) -> tuple[str, str]:
    ask = rng.choice(("", "Please ", "Can you ", "Now "))
    word, other, third = rng.sample(WORDS, 3)
    a, b = rng.sample(range(2, 100), 2)
    name, colour = rng.choice(NAMES), rng.choice(COLOURS)
    items = rng.sample(WORDS, rng.randrange(3, 6))
    listed = ", ".join(items)
    times = rng.randrange(2, 5)
    choices: tuple[tuple[str, str], ...] = (
        (f"{ask}write the word {word} in capital letters.", word.upper()),
        (f"{ask}repeat the word {word} {times} times.", " ".join([word] * times)),
        (f"{ask}tell me the first letter of {word}.", f"The first letter of {word} is {word[0]}."),
        (f"{ask}tell me the last letter of {word}.", f"The last letter of {word} is {word[-1]}."),
        (f"{ask}spell the word {word}.", "-".join(word)),
        (f"How many letters does {word} have?", f"The word {word} has {len(word)} letters."),
        (f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}."),
        (f"Is {a} an even number?", f"{'Yes' if a % 2 == 0 else 'No'}, {a} is {'even' if a % 2 == 0 else 'odd'}."),
        (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."),
        (f"{ask}list these words in alphabetical order: {listed}.", ", ".join(sorted(items)) + "."),
        (f"{ask}name the last item of this list: {listed}.", f"The last item is {items[-1]}."),
        (f"How many items are in this list: {listed}?", f"There are {len(items)} items in the list."),
        (
            f"{name} has a {colour} {word} and a {other}. What colour is the {word}?",
            f"The {word} is {colour}.",
        ),
        (f"{name} bought a {word}, a {other} and a {third}. Who bought the {other}?", f"{name} bought the {other}."),
        (f"{ask}put quotes around this: {word} {other}", f'"{word} {other}"'),
        (f"{ask}join the words {word} and {other}.", f"{word}{other}"),
    )
    question, answer = rng.choice(choices)
    return question[0].upper() + question[1:], answer


GENERATORS: dict[str, Callable[[int, int], list[Problem]]] = {
    "arithmetic": arithmetic,
    "sorting": sorting,
    "retrieval": retrieval,
    "instructions": instructions,
}
# Problems that stand in one document, a line each.
PER_DOCUMENT = {"arithmetic": 24, "sorting": 8, "retrieval": 5, "instructions": 4}
