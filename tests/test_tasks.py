"""Generated tasks: reproducible, solvable, and their answers are right."""

import re

import pytest

from moestro.data.tasks import ASSISTANT, END, GENERATORS, PER_DOCUMENT, USER, Problem, chat


@pytest.mark.parametrize("name", GENERATORS)
def test_same_seed_same_problems_other_seed_others(name: str) -> None:
    generate = GENERATORS[name]
    assert generate(3, 50) == generate(3, 50)
    assert generate(3, 50) != generate(4, 50)
    assert generate(3, 20) == generate(3, 50)[:20], "asking for more problems must not change the first ones"


@pytest.mark.parametrize("name", GENERATORS)
def test_prompt_and_answer_make_the_text(name: str) -> None:
    for problem in GENERATORS[name](0, 300):
        assert problem.prompt
        assert problem.answer
        assert problem.text == problem.prompt + problem.answer
        assert not problem.prompt[-1].isspace(), "a word must be tokenised with the space before it"


def test_asking_for_none_gives_none() -> None:
    assert all(generate(0, 0) == [] for generate in GENERATORS.values())


def solve_arithmetic(prompt: str) -> str:
    expression = prompt.removesuffix(" =")
    assert re.fullmatch(r"(\d+ [-+*] \d+|(max|min)\(\d+, \d+\))", expression)
    return str(eval(expression, {"max": max, "min": min}))


def solve_sorting(prompt: str) -> str:
    verb, items = prompt.removesuffix(" ->").split(": ")
    words = items.split()
    if verb == "reverse":
        return " ".join(reversed(words))
    return " ".join(sorted(words, key=int) if words[0].isdigit() else sorted(words))


def solve_retrieval(prompt: str) -> str:
    if prompt.startswith("copy: "):
        return prompt.removeprefix("copy: ").removesuffix(" |")
    pairs, key = prompt.removesuffix(" =").split(" ? ")
    return dict(pair.split(" = ") for pair in pairs.split(", "))[key]


@pytest.mark.parametrize(
    ("name", "solve"),
    [("arithmetic", solve_arithmetic), ("sorting", solve_sorting), ("retrieval", solve_retrieval)],
)
def test_an_independent_solver_gets_every_answer(name: str, solve) -> None:
    for problem in GENERATORS[name](1, 2000):
        assert f" {solve(problem.prompt)}" == problem.answer, problem


def test_differences_are_never_negative() -> None:
    assert all(not p.answer.strip().startswith("-") for p in GENERATORS["arithmetic"](0, 2000))


def test_instructions_are_one_exchange_in_the_chat_format() -> None:
    for problem in GENERATORS["instructions"](0, 1000):
        assert problem.prompt.startswith(USER)
        assert problem.prompt.endswith(f"{END}\n{ASSISTANT}")
        assert problem.answer.endswith(END)
        assert problem.text.count(END) == 2


def test_chat_wraps_question_and_answer() -> None:
    assert chat("Hi?", "Yes.") == Problem(f"{USER}Hi?{END}\n{ASSISTANT}", f"Yes.{END}")


def test_every_task_says_how_many_problems_make_a_document() -> None:
    assert set(PER_DOCUMENT) == set(GENERATORS)
