"""Reading documents, dividing them, and batching their tokens."""

import gzip
import json
import pickle
import sys
import warnings
from collections import Counter
from dataclasses import replace

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moestro.data import (
    Document,
    embedded,
    embedded_domains,
    limit_tokens,
    load_texts,
    split_heldout,
    token_batches,
)

CHAT_TEMPLATE = "{% for m in messages %}{{ '<bos>' + m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
QUICK = settings(max_examples=40, deadline=None)


def make_tokenizer(**kwargs):
    """One token per byte, so that a token id can be checked against the text it came from."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", **kwargs)


TOKENIZER = make_tokenizer()

words = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<>"), max_size=40)
corpora = st.lists(
    st.builds(Document, text=words, domain=st.sampled_from(["code", "math", "prose"])), min_size=1, max_size=12
).filter(lambda documents: not all(document.blank for document in documents))
sizes = st.one_of(
    st.builds(lambda n: {"batch_size": n}, st.integers(1, 5)),
    st.builds(lambda n: {"max_tokens_per_batch": n}, st.integers(16, 64)),
)
SAMPLE_ROWS = [
    {"text": "for x in y:\n", "domain": "code", "split": "calibration"},
    {"text": "while True:\u2028 pass", "domain": "code", "split": "heldout"},
    {"text": "2 + 2 = 4", "domain": "arithmetic", "split": "calibration"},
    {"text": "3 + 3 = 6", "domain": "arithmetic", "split": "heldout"},
]


def seen_tokens(batches):
    """(sample, position) -> (token id, domain name), asserting that none comes twice."""
    seen = {}
    for batch in batches:
        for row in range(len(batch.sample)):
            real = batch.attention_mask[row].bool()
            for token, position in zip(batch.input_ids[row][real].tolist(), batch.position[row][real].tolist()):
                place = (int(batch.sample[row]), position)
                assert place not in seen
                seen[place] = (token, batch.domains[batch.domain[row]])
    return seen


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one, other)
        for name in ("input_ids", "attention_mask", "sample", "start", "domain")
    )


def texts_of(documents):
    return [document.text for document in documents]


@pytest.fixture
def sample_directory(tmp_path):
    folder = tmp_path / "sample"
    folder.mkdir()
    for name in ("code", "arithmetic"):
        lines = [json.dumps(row, ensure_ascii=False) for row in SAMPLE_ROWS if row["domain"] == name]
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return folder


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Token batches


@QUICK
@given(corpora, sizes, st.integers(1, 16), st.sampled_from(["left", "right"]))
def test_every_token_occurs_once_and_is_traceable(documents, size, max_length, side):
    batches = token_batches(documents, TOKENIZER, max_length=max_length, padding_side=side, **size)
    expected = {}
    for sample, document in enumerate(documents):
        ids = [] if document.blank else TOKENIZER(document.text)["input_ids"]
        expected |= {(sample, position): (token, document.domain) for position, token in enumerate(ids)}
    assert seen_tokens(batches) == expected
    assert batches.num_tokens == len(expected)
    counted = Counter(domain for _, domain in expected.values())
    assert batches.tokens_by_domain == {name: counted[name] for name in sorted({d.domain for d in documents})}


@QUICK
@given(corpora, sizes, st.integers(1, 16), st.sampled_from(["left", "right"]))
def test_padding_is_on_one_side_and_within_the_limits(documents, size, max_length, side):
    for batch in token_batches(documents, TOKENIZER, max_length=max_length, padding_side=side, **size):
        rows, width = batch.input_ids.shape
        steps = batch.attention_mask.diff(dim=1)
        assert bool((steps <= 0).all() if side == "right" else (steps >= 0).all())
        assert torch.equal(batch.position == -1, batch.attention_mask == 0)
        assert int(batch.attention_mask.sum(dim=1).max()) == width <= max_length
        assert rows <= size.get("batch_size", rows)
        assert rows * width <= size.get("max_tokens_per_batch", rows * width)


@QUICK
@given(corpora, sizes, st.integers(1, 5))
def test_shards_together_are_the_whole(documents, size, world):
    batches = token_batches(documents, TOKENIZER, max_length=7, **size)
    shards = [batches.shard(rank, world) for rank in range(world)]
    merged = {}
    for shard in shards:
        part = seen_tokens(shard)
        assert not part.keys() & merged.keys()
        merged |= part
    assert merged == seen_tokens(batches)
    assert sum(shard.num_tokens for shard in shards) == batches.num_tokens
    assert sum(len(shard) for shard in shards) == len(batches)


@QUICK
@given(corpora, sizes)
def test_batches_are_the_same_in_every_pass_build_and_process(documents, size):
    batches = token_batches(documents, TOKENIZER, max_length=9, **size)
    assert same(batches, batches)
    assert same(batches, token_batches(documents, TOKENIZER, max_length=9, **size))
    assert same(batches, pickle.loads(pickle.dumps(batches)))


@QUICK
@given(corpora)
def test_row_order_does_not_depend_on_the_batch_size(documents):
    def rows(**size):
        batches = token_batches(documents, TOKENIZER, max_length=9, **size)
        return [place for batch in batches for place in zip(batch.sample.tolist(), batch.start.tolist())]

    assert rows(batch_size=1) == rows(batch_size=4) == rows(max_tokens_per_batch=20)


@QUICK
@given(corpora, st.integers(1, 60), st.integers(0, 3), st.booleans())
def test_limit_keeps_exactly_n_tokens_and_grows_with_n(documents, n, seed, per_domain):
    batches = token_batches(documents, TOKENIZER, max_length=6, batch_size=3)
    limited = limit_tokens(batches, n, per_domain=per_domain, seed=seed)
    if per_domain:
        assert limited.tokens_by_domain == {name: min(n, c) for name, c in batches.tokens_by_domain.items()}
    else:
        assert limited.num_tokens == min(n, batches.num_tokens)
    seen = seen_tokens(limited)
    assert seen.items() <= seen_tokens(limit_tokens(batches, n + 5, per_domain=per_domain, seed=seed)).items()
    assert seen.items() <= seen_tokens(batches).items()
    assert same(limited, limit_tokens(batches, n, per_domain=per_domain, seed=seed))


def test_limit_draws_differ_by_seed():
    batches = token_batches([Document(text="abcdefghij" * 50)], TOKENIZER, max_length=10, batch_size=4)
    assert seen_tokens(limit_tokens(batches, 50, seed=0)) != seen_tokens(limit_tokens(batches, 50, seed=1))


def test_to_moves_every_tensor():
    (batch,) = token_batches([Document(text="abc")], TOKENIZER, max_length=8)
    moved = batch.to("meta")
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert moved.domains == batch.domains
    assert batch.num_tokens == 3


def test_too_long_a_document_can_be_refused():
    documents = [Document(text="short"), Document(text="x" * 1234, domain="code")]
    with pytest.raises(ValueError, match=r"document 1 .*'code'.* has 1,234 tokens; the context is 100; .*split"):
        token_batches(documents, TOKENIZER, max_length=100, overflow="refuse")
    assert token_batches(documents, TOKENIZER, max_length=1234, overflow="refuse").num_tokens == 1239


def test_batching_refuses_what_cannot_be():
    documents = [Document(text="x" * 50)]
    with pytest.raises(ValueError, match="max_tokens_per_batch=10 is less than the longest row"):
        token_batches(documents, TOKENIZER, max_length=20, max_tokens_per_batch=10)
    with pytest.raises(ValueError, match="not both"):
        token_batches(documents, TOKENIZER, max_length=20, batch_size=1, max_tokens_per_batch=100)
    with pytest.raises(ValueError, match="max_length=0"):
        token_batches(documents, TOKENIZER, max_length=0)
    with pytest.raises(ValueError, match="not a single usable token"):
        token_batches([Document(text=" \n")], TOKENIZER, max_length=20)
    batches = token_batches(documents, TOKENIZER, max_length=20)
    with pytest.raises(ValueError, match="rank=2"):
        batches.shard(2, 2)
    with pytest.raises(ValueError, match="n=0"):
        limit_tokens(batches, 0)


# Conversations


def test_conversations_go_through_the_chat_template():
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    documents = [Document(text="plain"), Document(messages=messages, domain="chat")]
    (batch,) = token_batches(documents, tokenizer, max_length=64)
    row = batch.sample.tolist().index(1)
    ids = batch.input_ids[row][batch.attention_mask[row].bool()]
    assert tokenizer.decode(ids) == "<bos>user:hi\n<bos>assistant:yes?\n"


TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"city": {"type": "string"}}}}]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Kyiv"}}}
CALLING = {
    "messages": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
    ],
    "tools": TOOLS,
    "documents": [{"title": "atlas", "text": "of clouds"}],
    "chat_template_kwargs": {"style": "terse"},
    "enable_thinking": False,
}
SEES_ALL = (
    "{{ tools | tojson }}{{ documents | tojson }}{{ style }}{{ enable_thinking }}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("how", ["list", "jsonl", "parquet", "JSON in strings", "dataset"])
def test_a_template_is_given_all_that_a_record_holds_for_it(how, tmp_path):
    written = {name: CALLING[name] for name in ("tools", "documents", "chat_template_kwargs")}
    source = [CALLING]
    if how == "jsonl":
        source = tmp_path / "calls.jsonl"
        source.write_text(json.dumps(CALLING))
    elif how == "JSON in strings":
        source = [CALLING | {name: json.dumps(value) for name, value in written.items()}]
    elif how == "parquet":
        source = tmp_path / "calls.parquet"
        pl.DataFrame([CALLING]).write_parquet(source)
    elif how == "dataset":
        source = pytest.importorskip("datasets").Dataset.from_list([CALLING])
    tokenizer = make_tokenizer(chat_template=SEES_ALL)
    (document,) = load_texts(source)
    rendered = tokenizer.apply_chat_template(document.messages, tokenize=False, **document.template)
    messages, further = CALLING["messages"], dict(CALLING["chat_template_kwargs"], enable_thinking=False)
    expected = tokenizer.apply_chat_template(
        messages, tools=TOOLS, documents=CALLING["documents"], tokenize=False, **further
    )
    assert "get_weather" in expected
    assert "terse" in expected
    assert "clouds" in expected
    assert rendered == expected


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("tools", "{not json", "not JSON"),
        ("tools", ["a name"], "a list of objects"),
        ("chat_template_kwargs", {"tokenize": True}, "says how text is tokenised"),
    ],
)
def test_what_a_template_cannot_be_given_is_refused(field, value, words):
    with pytest.raises(ValueError, match=words):
        load_texts([CALLING | {field: value}])


def test_a_conversation_without_template_is_refused_with_its_number():
    documents = [Document(text="a"), Document(messages=[{"role": "user", "content": "hi"}], domain="chat")]
    with pytest.raises(ValueError, match=r"document 1 .*'chat'.*no chat template"):
        token_batches(documents, TOKENIZER, max_length=8)


def test_what_the_template_rejects_is_named():
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"document 0 .*roles must alternate"):
        token_batches([Document(messages=[{"role": "user", "content": "hi"}])], tokenizer, max_length=8)


# Held-out parts


@QUICK
@given(corpora, st.floats(0.05, 0.9), st.integers(0, 3), st.randoms(use_true_random=False))
def test_split_is_disjoint_complete_and_free_of_order(documents, fraction, seed, random):
    # Texts of several words that name their domain: every domain can be divided.
    documents = [replace(d, text="" if d.blank else f"{d.domain} says {d.text}") for d in documents]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibration, heldout = split_heldout(documents, fraction, seed=seed)
        shuffled = random.sample(documents, len(documents))
        again = split_heldout(shuffled, fraction, seed=seed)
    assert not {d.key for d in calibration} & {d.key for d in heldout}
    assert (
        {d.domain for d in calibration} == {d.domain for d in heldout} == {d.domain for d in documents if not d.blank}
    )
    assert [{d.key for d in part} for part in again] == [{d.key for d in calibration}, {d.key for d in heldout}]
    for domain in {d.domain for d in documents}:
        distinct = {d.key for d in documents if d.domain == domain and not d.blank}
        held = {d.key for d in heldout if d.domain == domain}
        if len(distinct) > 1:
            assert held <= distinct
            assert len(held) == min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)


def test_a_single_document_is_cut_and_says_so():
    text = "".join(f"line {i}\n" for i in range(100))
    with pytest.warns(UserWarning, match="'log' has a single document"):
        (first,), (last,) = split_heldout([Document(text=text, domain="log")], 0.2)
    assert first.text + last.text == text.strip()
    assert first.text.endswith("\n")
    assert 0.15 < len(last.text) / len(text) < 0.25


def test_declared_heldout_documents_are_exactly_the_heldout_part():
    documents = [Document(text=f"t{i}", split="test" if i == 3 else "train") for i in range(6)]
    calibration, heldout = split_heldout(documents, 0.5)
    assert texts_of(heldout) == ["t3"]
    assert texts_of(calibration) == ["t0", "t1", "t2", "t4", "t5"]


def test_a_copy_of_a_heldout_document_is_not_calibrated_on():
    documents = [Document(text="leak", split="test"), Document(text="leak"), Document(text="own")]
    calibration, _ = split_heldout(documents)
    assert texts_of(calibration) == ["own"]
    elsewhere = [*documents, Document(text="leak", domain="b"), Document(text="x", domain="b", split="test")]
    with (
        pytest.warns(UserWarning, match="1 calibration documents are copies"),
        pytest.raises(ValueError, match="domain 'b' has no calibration"),
    ):
        split_heldout(elsewhere)


@pytest.mark.parametrize(
    ("documents", "fraction", "message"),
    [
        ([Document(text="a b")], 1.0, "fraction=1.0"),
        ([Document(text=" ")], 0.1, "nothing to split"),
        ([Document(text="word")], 0.1, "single text of one word"),
        ([Document(messages=[{"role": "user", "content": "hi"}])], 0.1, "single conversation"),
        ([Document(text="a", split="test")], 0.1, "no calibration document"),
    ],
)
def test_a_split_with_an_empty_part_is_refused(documents, fraction, message):
    with pytest.raises(ValueError, match=message):
        split_heldout(documents, fraction)


# Sources


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet", "dataset", "memory", "frame"])
def test_every_form_gives_the_same_documents(tmp_path, form):
    rows = [{"text": f"text {i}", "domain": "ab"[i % 2], "id": i} for i in range(4)]
    path = tmp_path / f"data.{form}"
    if form == "memory":
        path = rows
    elif form == "frame":
        path = pl.DataFrame(rows)
    elif form == "parquet":
        pl.DataFrame(rows).write_parquet(path)
    elif form == "dataset":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        content = json.dumps(rows) if form.startswith("json.") or form == "json" else "\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(content.encode()) if form.endswith("gz") else content.encode())
    assert load_texts(path) == [Document(text=row["text"], domain=row["domain"]) for row in rows]


def test_domain_is_the_records_then_the_label_then_the_argument_then_the_file(tmp_path):
    path = jsonl(tmp_path / "math.jsonl", [{"text": "a", "domain": "own"}, {"text": "b"}])

    def domains(*args, **kwargs):
        return [document.domain for document in load_texts(*args, **kwargs)]

    assert domains(path) == ["own", "math"]
    assert domains(str(path), domain="given") == ["own", "given"]
    assert domains(f"label={path}", domain="given") == ["own", "label"]
    assert domains([{"text": "a"}, "two words"]) == ["text", "text"]


def test_folders_are_read_in_order_with_their_domains(tmp_path):
    jsonl(tmp_path / "math-00001-of-00002.jsonl", [{"text": "m1"}])
    jsonl(tmp_path / "math-00000-of-00002.jsonl", [{"text": "m0"}])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "b.txt").write_text("second")
    (tmp_path / "prose" / "a.txt").write_text("first\n\nstill first")
    documents = load_texts(tmp_path)
    assert [(d.domain, d.text) for d in documents] == [
        ("math", "m0"),
        ("math", "m1"),
        ("prose", "first\n\nstill first"),
        ("prose", "second"),
    ]


def test_messages_survive_parquet_and_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "name": "bot"}]
    rows = [{"messages": messages}]
    pl.DataFrame(rows).write_parquet(tmp_path / "chat.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "chat")
    for source in (tmp_path / "chat.parquet", tmp_path / "chat", rows):
        assert load_texts(source) == [Document(messages=messages, domain="text" if source is rows else "chat")]


def test_a_saved_dataset_with_splits_keeps_its_test_part_apart(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list([{"text": f"{name} text"}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert texts_of(load_texts(tmp_path / "both")) == ["train text"]
    assert texts_of(load_texts(tmp_path / "both", split="heldout")) == ["test text"]
    assert texts_of(load_texts(tmp_path / "both", split="all")) == ["train text", "test text"]


def test_text_field_names_another_field(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "no", "body": "yes"}])
    assert texts_of(load_texts(path, text_field="body")) == ["yes"]


def test_unicode_line_separators_do_not_break_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    assert texts_of(load_texts(path)) == ["a\u2028b\x85c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("blank.jsonl", b"\n \n", "blank.jsonl is empty"),
        ("empty.json", b"[]", "empty.json is empty"),
        ("empty.parquet", b"", "empty.parquet is empty"),
        ("bad.parquet", b"PAR1 not really", "bad.parquet is not a readable Parquet file"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": \n', r"bad.jsonl, line 3: not JSON: .*column"),
        ("bad.json", b'[{"text": "a"},\n oops]', r"bad.json: not JSON: .*line 2, column 2"),
        ("field.jsonl", b'{"text": "a"}\n{"body": "a", "id": 1}', r"line 2: no field 'text' or 'messages'; .*body, id"),
        ("null.jsonl", b'{"text": null}', "line 1: field 'text' is null"),
        ("type.jsonl", b'{"text": 3}', "line 1: field 'text' is a int"),
        ("number.jsonl", b"3", "line 1: a int; a record is"),
        ("chat.jsonl", b'{"messages": [{"content": "x"}]}', "line 1: message 1 is .*role"),
        ("blank.json", b'[{"text": " "}, ""]', "not a single usable token: its 2 documents are blank"),
        ("data.csv", b"a,b", r"cannot read .csv; give .txt, .jsonl, .json, .parquet"),
        ("latin.txt", "é".encode("latin-1"), "not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "abc"}')[:-9], "not a whole gzip file"),
        ("held.jsonl", b'{"text": "a", "split": "test"}', "no document for split='calibration'.*'test'"),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_texts(tmp_path / name)
    assert name in str(caught.value)


def test_other_unusable_sources_are_refused(tmp_path):
    pl.DataFrame({"body": ["a"]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"a.parquet: no field 'text' or 'messages'; its fields are: body; .*text_field"
    ):
        load_texts(tmp_path / "a.parquet")
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*gone.*embedded domains are"):
        load_texts(str(tmp_path / "gone.jsonl"))
    with pytest.raises(FileNotFoundError, match="no file or folder 'no-such-domain'"):
        load_texts(["no-such-domain"])
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_texts("a text on its own is not taken for data " * 200)
    with pytest.raises(ValueError, match="no embedded domain 'klingon'"):
        load_texts("embedded:klingon")
    with pytest.raises(ValueError, match="an empty list"):
        load_texts([])
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"other has no file to read .*it is empty"):
        load_texts(tmp_path / "other")
    (tmp_path / "other" / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"other has no file to read .*it has .bin"):
        load_texts(tmp_path / "other")
    with pytest.raises(ValueError, match="no document for split='heldout'"):
        load_texts([{"text": "a"}], split="heldout")


def test_without_the_datasets_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install moestro\[datasets\]"):
        load_texts(tmp_path)


# The embedded sample


def test_embedded_sample_by_domain_and_split(sample_directory):
    assert embedded_domains(sample_directory) == ("arithmetic", "code")
    assert texts_of(embedded(directory=sample_directory)) == ["2 + 2 = 4", "for x in y:\n"]
    assert texts_of(embedded(["code"], "heldout", directory=sample_directory)) == ["while True:\u2028 pass"]
    assert len(embedded("code", "all", directory=sample_directory)) == 2
    with pytest.raises(ValueError, match="no embedded domain 'poetry'; there are: arithmetic, code"):
        embedded(["poetry"], directory=sample_directory)


def test_embedded_domains_are_sources(sample_directory, monkeypatch, tmp_path):
    real_domains, real_embedded = embedded_domains, embedded
    monkeypatch.setattr("moestro.data.texts.embedded_domains", lambda: real_domains(sample_directory))
    monkeypatch.setattr(
        "moestro.data.texts.embedded", lambda d, split: real_embedded(d, split, directory=sample_directory)
    )
    monkeypatch.chdir(tmp_path)
    assert texts_of(load_texts("code")) == ["for x in y:\n"]
    assert texts_of(load_texts("code", split="heldout")) == ["while True:\u2028 pass"]
    assert [d.domain for d in load_texts(["python=code", "arithmetic"])] == ["python", "arithmetic"]
    assert len(load_texts("embedded", split="all")) == 4
    (tmp_path / "code").mkdir()
    with pytest.raises(ValueError, match="'code' is an embedded domain and also a file or folder"):
        load_texts("code")
    assert texts_of(load_texts("embedded:code")) == ["for x in y:\n"]


@pytest.mark.skipif(not embedded_domains(), reason="the embedded sample is not built")
def test_the_shipped_sample_has_both_parts_of_every_domain():
    for domain in embedded_domains():
        calibration, heldout = embedded(domain), embedded(domain, "heldout")
        assert calibration
        assert heldout
        assert not {d.key for d in calibration} & {d.key for d in heldout}
