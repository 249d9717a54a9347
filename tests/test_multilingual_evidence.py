"""What the experiment on multilingual routing rests on: its controls, its problems, and how answers are scored."""

import pytest
import torch

import moestro
from moestro.analyze.multilingual_routing import language_profiles
from moestro.evidence.multilingual_arithmetic import OTHERS, TEMPLATES, Problem, answers, fine_tune, problems
from moestro.evidence.multilingual_routing import LENGTH_BLOCK, exchanged, halves, plain_strings, reordered
from moestro.fitting.evaluate import continuations


@pytest.fixture(scope="module")
def view():
    return moestro.open("quartet", dtype=torch.float32)


def test_no_text_stays_at_its_place_or_leaves_its_block() -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    blocks = order.split(LENGTH_BLOCK)
    found = exchanged(blocks, torch.Generator().manual_seed(0))
    assert sorted(found.tolist()) == list(range(40))
    assert not (found == torch.arange(40)).any()
    for block in blocks:
        assert set(found[block].tolist()) == set(block.tolist())


def test_halves_have_no_string_in_common() -> None:
    choosing, reported = halves(101)
    assert sorted([*choosing.tolist(), *reported.tolist()]) == list(range(101))


def test_strings_stand_in_the_same_order_without_placeholders() -> None:
    strings = plain_strings(("en", "de"))
    assert len(strings["en"]) == len(strings["de"]) > 300
    assert not any(sign in text for texts in strings.values() for text in texts for sign in "%{}0123456789")


def test_another_order_moves_the_english_rows_alone(view) -> None:
    texts = {"en": ["a cat", "the dog", "no", "red sun"], "de": ["eine Katze", "der Hund", "nein", "rote Sonne"]}
    profiles = language_profiles(view, texts, progress=False)
    chosen, order = torch.tensor([0, 2, 3]), torch.tensor([1, 2, 0])
    moved = reordered(profiles, chosen, order)
    for layer, q in moved.of("en").importance.items():
        assert torch.equal(q, profiles.of("en").importance[layer][chosen[order]])
        assert torch.equal(moved.of("de").importance[layer], profiles.of("de").importance[layer][chosen])


def test_tested_problems_are_not_trained_on_and_have_their_answers() -> None:
    train, held_out = problems()
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train)
    assert [Problem(kind, 12, 5).answer for kind in range(4)] == [17, 7, 12, 5]
    assert all(p.answer >= 0 for p in train)
    assert Problem(0, 12, 5).prompt("es") == "la suma de 12 y 5 es"
    assert len({Problem(3, 12, 5).prompt(language) for language in TEMPLATES}) == len(OTHERS) + 1


def test_exact_match_is_what_generation_writes(view) -> None:
    some = problems()[0][:24]
    fine_tune(view, some, steps=12, seed=0)
    exact, loss = answers(view, "en", some)
    prompts = [p.prompt("en") for p in some]
    written = continuations(view.model, view.tokenizer, prompts, new_tokens=6)
    right = [text.startswith(f" {p.answer}\n") for text, p in zip(written, some, strict=True)]
    assert exact.tolist() == right
    assert 0 < sum(right) < len(right)
    alone = [answers(view, "en", [p])[1].item() for p in some[:3]]
    assert loss[:3].tolist() == pytest.approx(alone, rel=1e-4)
