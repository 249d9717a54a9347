"""The corpus: nothing held out is trained on, and the same input always gives the same documents."""

import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.data import tasks
from moestro.train import catalogs, corpus, packing
from moestro.train.catalogs import Phrase
from moestro.train.corpus import WEIGHTS, Document
from moestro.train.tokenizer import CHAT_TEMPLATE, train_tokenizer

LIBRARY = list(itertools.islice(corpus.stdlib_files(), 60))


@given(st.text(min_size=1))
def test_the_split_ignores_case_and_surrounding_space(key: str) -> None:
    assert corpus.split_of(key) in corpus.SPLITS
    assert corpus.split_of(f" {key.lower()}\n") == corpus.split_of(key.lower())


def test_the_split_has_the_shares_it_says() -> None:
    splits = [corpus.split_of(str(n), 0.3) for n in range(20_000)]
    assert abs(splits.count("calibration") / 20_000 - 0.2) < 0.02
    assert abs(splits.count("heldout") / 20_000 - 0.1) < 0.02


def test_pieces_lose_no_line_of_a_file() -> None:
    for _, text in LIBRARY:
        if len(text) > 200:
            joined = "\n".join(corpus.pieces(text))
            lines = [line.strip() for line in joined.splitlines() if line.strip()]
            source = [line.strip() for line in text.splitlines() if line.strip()]
            assert lines == source[: len(lines)], "pieces keep order"
            assert len("".join(source[len(lines) :])) < 80, "only a short tail may be dropped"


def test_library_documents_are_reproducible_and_a_file_stays_in_one_split() -> None:
    first = list(corpus.file_documents(LIBRARY, "code"))
    assert first == list(corpus.file_documents(LIBRARY, "code"))
    assert not any("/test/" in name for name, _ in LIBRARY)
    for name, text in LIBRARY:
        assert len({d.split for d in corpus.file_documents([(name, text)], "code")}) <= 1


def phrases() -> list[Phrase]:
    """Strings that share translations across splits, as real catalogs do."""
    made = []
    for n in range(400):
        shared = f"geteilt {n % 37}"
        languages = {"de": shared if n % 3 else f"deutsch {n}", "fr": f"francais {n}", "ru": f"русский {n}"}
        made.append(Phrase(f"english text {n}", "catalog", languages))
    return made


def test_no_held_out_string_is_trained_on() -> None:
    documents = list(corpus.string_documents(phrases()))
    lines = {
        split: {line for d in documents if d.split == split for line in d.text.split("\n")} for split in corpus.SPLITS
    }
    assert all(lines.values())
    for one, other in itertools.combinations(corpus.SPLITS, 2):
        assert not lines[one] & lines[other]


def test_parallel_documents_do_not_leak_translations() -> None:
    made = phrases()
    held = {
        text
        for phrase in made
        if corpus.split_of(phrase.english, corpus.HELD_OUT_STRINGS) != "train"
        for text in phrase.translations.values()
    }
    trained = [d.text for d in corpus.parallel_documents(made) if d.split == "train"]
    assert trained
    assert not {line.split(": ", 1)[1] for text in trained for line in text.split("\n")} & held


def test_no_held_out_prompt_is_trained_on() -> None:
    documents = list(corpus.generated_documents(1500))
    assert {d.domain for d in documents} == set(tasks.GENERATORS)
    problems = {
        split: {line for d in documents if d.split == split and d.domain == "arithmetic" for line in d.text.split("\n")}
        for split in corpus.SPLITS
    }
    assert problems["train"]
    assert not problems["train"] & (problems["heldout"] | problems["calibration"])


def test_a_text_in_two_splits_stays_held_out() -> None:
    documents = [Document("a", "docs", "train"), Document("a", "docs", "heldout"), Document("b", "docs", "train")]
    assert corpus.drop_duplicates(documents) == documents[1:]


def test_catalogs_in_a_wheel_are_aligned_by_their_english_text(tmp_path: Path) -> None:
    pytest.importorskip("polib")
    entry = 'msgid "Save"\nmsgstr "{}"\n\n#, fuzzy\nmsgid "Open"\nmsgstr "x"\n'
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        for tag, text in (("de", "Sichern"), ("uk_UA", "Зберегти"), ("xx", "no")):
            wheel.writestr(f"app/locale/{tag}/LC_MESSAGES/django.po", 'msgid ""\nmsgstr ""\n\n' + entry.format(text))
    found = catalogs.phrases_in(tmp_path / "w.whl", "app")
    assert found["Save"].translations == {"de": "Sichern", "uk": "Зберегти"}
    assert "Open" not in found, "unfinished translations are left out"


def test_translation_json_is_aligned_by_its_keys(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("app/translations/en.json", json.dumps({"a": {"b": "Hello  there"}, "c": "OK"}))
        wheel.writestr("app/translations/zh-Hans.json", json.dumps({"a": {"b": "你好"}, "c": "OK"}))
    found = catalogs.phrases_in(tmp_path / "w.whl", "app")
    assert {english: phrase.translations for english, phrase in found.items()} == {"Hello there": {"zh": "你好"}}


def test_weights_name_every_domain_once() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1.0, abs=0.05)
    assert set(tasks.GENERATORS) < set(WEIGHTS)


@pytest.fixture(scope="module")
def small_tokenizer():
    documents = [
        *corpus.file_documents(LIBRARY[:20], "code"),
        *corpus.generated_documents(100),
        Document("Grüße, мир, 世界", "ui-de", "train"),
    ]
    return train_tokenizer(documents, vocabulary=600)


def test_the_tokenizer_round_trips_any_text(small_tokenizer) -> None:
    for text in ("def f(x):\n    return  x", "Straße 128 → мир", "안녕 世界 مرحبا", "  two  spaces\t\n"):
        ids = small_tokenizer(text).input_ids
        assert ids[0] == small_tokenizer.bos_token_id
        assert small_tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(small_tokenizer("1234", add_special_tokens=False).input_ids) == 4, "numbers are single digits"


def test_the_chat_template_is_the_format_of_the_instructions(small_tokenizer) -> None:
    assert small_tokenizer.chat_template == CHAT_TEMPLATE
    messages = [{"role": "user", "content": "Hi?"}]
    prompt = small_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == small_tokenizer.bos_token + tasks.chat("Hi?", "").prompt
    messages.append({"role": "assistant", "content": "Yes."})
    whole = small_tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == small_tokenizer.bos_token + tasks.chat("Hi?", "Yes.").text + "\n"


def test_packed_rows_hold_one_domain_and_are_reproducible(small_tokenizer) -> None:
    documents = [Document("aaa " * 40, "docs", "train"), Document("zzz " * 40, "code", "train")]
    rows_of = {"docs": 3, "code": 2}
    tokens, domain = packing.pack(documents, small_tokenizer, rows_of, seed=5)
    again, _ = packing.pack(documents, small_tokenizer, rows_of, seed=5)
    assert tokens.shape == (5, packing.ROW)
    assert tokens.dtype == np.uint16
    assert np.array_equal(tokens, again)
    assert sorted(domain) == [0, 0, 0, 1, 1]
    for row, index in zip(tokens, domain):
        text = small_tokenizer.decode(row.tolist(), skip_special_tokens=True)
        assert set(text) - {" "} == ({"a"} if index == 0 else {"z"})


def test_training_rows_follow_the_weights() -> None:
    rows = packing.training_rows(4_000_000)
    assert sum(rows.values()) * packing.ROW == pytest.approx(4_000_000, rel=0.01)
    assert rows["code"] > rows["parallel"] > 0
