"""The translation experiment's parts: a split without leaks, masks, draws that hold in decoding, what is measured."""

import importlib.util
import itertools
import math
import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moestro.evidence import thor
from moestro.evidence import translation as t
from moestro.evidence.base import Rows
from moestro.layers.routers.stochastic import StochasticRouter, set_dispatch
from moestro.train.consistency import IGNORED

ROUTINGS = ("one expert", "switch", "stochastic")
SEEN = 10
"""Pairs of the tests: the shortest of the development part."""


def model(routing: t.Routing = "stochastic") -> t.Translator:
    return t.Translator(routing).eval()


def few() -> list[t.Pair]:
    return t.pairs("development")[:SEEN]


# Strings


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Delete 3 files", "delete files!"),
        ("%(count)s files by %s", "Files, by {name}"),
        ("${path}: <b>Öffnen</b> $x", "öffnen"),
    ],
)
def test_texts_that_differ_in_case_digits_and_placeholders_are_the_same(text: str, same: str) -> None:
    assert t.essence(text) == t.essence(same) != ""
    assert t.essence(text) != t.essence(text + " again")


def test_no_part_shares_a_text_with_another() -> None:
    parts = t.strings()
    assert list(parts) == ["test", "development", "training"]
    total = sum(map(len, parts.values()))
    assert total > 1200
    for part, share in t.SHARES.items():
        assert len(parts[part]) / total == pytest.approx(share / 100, abs=0.03)
    for a, b in itertools.combinations(parts.values(), 2):
        for language in t.LANGUAGES:
            shared = [{re.sub(r"\d|%\(\w+\)s|\{\w+\}", "", s[language]).casefold() for s in part} for part in (a, b)]
            assert not shared[0] & shared[1]
            assert not {t.essence(s[language]) for s in a} & {t.essence(s[language]) for s in b}


def test_a_text_known_from_another_part_is_left_out_in_either_language(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["".join(letters) for letters in itertools.product("abcd", repeat=3)]
    test = next(word for word in words if t._part(word) == "test")
    training = [word for word in words if t._part(word) == "training"][:3]
    found = [
        {"en": test, "de": "Datei"},
        {"en": training[0], "de": "datei 2"},
        {"en": training[1], "de": "Ordner"},
        {"en": training[2], "de": "O" * (t.LONGEST + 1)},
        {"en": "%s", "de": "%s"},
        {"en": test.upper() + " {n}", "de": "Verzeichnis %(name)s"},
    ]
    monkeypatch.setattr(t, "parallel_strings", lambda languages: found)
    parts = t.strings.__wrapped__()
    masked = {"en": test.upper() + " @", "de": "Verzeichnis @"}
    assert parts == {"test": [found[0], masked], "development": [], "training": [found[2]]}


@given(st.text(max_size=20))
def test_every_text_comes_back_from_its_tokens(text: str) -> None:
    text = text.strip()
    assert t.text_of(t.vocabulary().encode(text).ids) == text or "<" in text


def test_an_epoch_holds_every_pair_once_in_an_order_of_its_seed() -> None:
    data = t.pairs("training")[:200]

    def rows(seed: int, count: int) -> list[list[int]]:
        found = itertools.islice(t.shuffled(data, seed), count)
        return [[i for i in row if i != IGNORED] for batch in found for row in batch.labels.tolist()]

    epoch = math.ceil(len(data) / t.ROWS)
    assert sorted(rows(0, epoch)) == sorted([*target, t.END] for _, target in data)
    assert rows(0, 2 * epoch)[: len(data)] == rows(0, epoch) != rows(1, epoch)
    assert rows(0, 2 * epoch)[len(data) :] != rows(0, epoch)


# The model


def test_every_second_block_has_experts() -> None:
    for routing in ROUTINGS:
        whole = model(routing)
        for blocks in (whole.encoder, whole.decoder):
            experts = [block.feed_forward.experts.num_experts for block in blocks]
            assert experts == [1 if routing == "one expert" else t.EXPERTS, 1]


@pytest.mark.parametrize("routing", ROUTINGS)
@torch.no_grad()
def test_padding_changes_nothing(routing: t.Routing) -> None:
    translator, pairs = model(routing), t.pairs("development")
    set_dispatch(translator, level="batch")
    short, long = pairs[0], pairs[-1]
    together = translator(t.batch_of([short, long]))
    for row, pair in enumerate((short, long)):
        alone = translator(t.batch_of([pair]))[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("routing", ROUTINGS)
@torch.no_grad()
def test_later_tokens_do_not_change_earlier_predictions(routing: t.Routing) -> None:
    translator = model(routing)
    batch = t.batch_of(t.pairs("development")[-4:])
    other = batch.target.clone()
    other[:, 6:] = torch.randint(2, t.VOCABULARY, other[:, 6:].shape)
    source = translator.encode(batch.source)
    one, two = (translator.decode(ids, source)[0] for ids in (batch.target, other))
    torch.testing.assert_close(one[:, :6], two[:, :6], atol=1e-5, rtol=1e-5)
    assert ((one - two)[:, 6:].abs().amax(dim=-1) > 1e-2).all()


@torch.no_grad()
def test_the_source_is_read() -> None:
    translator, batch = model("one expert"), t.batch_of(few())
    other = t.Batch(batch.source.flip(0), batch.target, batch.labels)
    assert ((translator(batch) - translator(other)).abs().amax(dim=(1, 2)) > 1e-2).all()


def test_a_text_beyond_the_positions_is_refused() -> None:
    long = t.batch_of([([5] * t.POSITIONS, [5])])
    with pytest.raises(ValueError, match=rf"{t.POSITIONS + 1} tokens does not fit the model's {t.POSITIONS} positions"):
        model()(long)


# Decoding


@pytest.fixture(scope="module")
def trained() -> t.Translator:
    """A stochastic translator that knows a few pairs by heart."""
    torch.manual_seed(0)
    translator = t.Translator("stochastic")
    batch = t.batch_of(few())
    for _ in t.train(translator, itertools.repeat(batch), 150, alpha=1.0):
        pass
    return translator.eval()


def test_what_was_learned_by_heart_is_translated_whatever_is_drawn(trained: t.Translator) -> None:
    batch = t.batch_of(few())
    for seed in range(3):
        set_dispatch(trained, seed=seed)
        assert t.greedy(trained, batch.source) == [target for _, target in few()]
    set_dispatch(trained, seed=0)
    loss, accuracy = t.likelihood(trained, [batch])
    assert accuracy == 1
    assert loss < 0.7


@pytest.mark.parametrize("routing", ROUTINGS)
@torch.no_grad()
def test_a_batch_is_decoded_like_its_rows_alone(routing: t.Routing, trained: t.Translator) -> None:
    translator = trained if routing == "stochastic" else model(routing)
    unknown = t.pairs("test")[::20]
    batch = t.batch_of(unknown)
    set_dispatch(translator, level="batch")
    try:
        alone = [t.greedy(translator, t.batch_of([pair]).source, limit=15)[0] for pair in unknown]
        assert t.greedy(translator, batch.source, limit=15) == alone
        assert len({len(row) for row in alone}) > 1 or routing != "stochastic"
    finally:
        set_dispatch(translator, level="sentence")


@torch.no_grad()
def test_a_sentence_keeps_its_experts_while_it_is_decoded(trained: t.Translator) -> None:
    batch = t.batch_of(t.pairs("test")[::15])
    drawn: list[Tensor] = []
    router = trained.decoder[0].feed_forward.router
    handle = router.register_forward_hook(lambda module, args, out: drawn.append(out.indices[:, 0].clone()))
    try:
        written = t.greedy(trained, batch.source, limit=12)
    finally:
        handle.remove()
    steps = torch.stack(drawn)
    assert len(steps) > 4
    assert (steps == steps[0]).all()
    assert len(steps[0].unique()) > 1
    # without a cache: the whole prefix again at every step
    source = trained.encode(batch.source)
    ids = torch.full((len(written), 1), t.END)
    for _ in range(12):
        ids = torch.cat([ids, trained.decode(ids, source)[0][:, -1:].argmax(dim=-1)], dim=1)
    for row, tokens in zip(ids[:, 1:].tolist(), written):
        assert row[: len(tokens)] == tokens
        assert len(tokens) == 12 or row[len(tokens)] == t.END


@torch.no_grad()
def test_other_draws_predict_otherwise() -> None:
    translator, batch = model(), t.batch_of(few())
    seen = []
    for seed in (0, 0, 1):
        set_dispatch(translator, seed=seed)
        seen.append(translator(batch))
    assert torch.equal(seen[0], seen[1])
    assert (seen[0] - seen[2]).abs().max() > 0.01
    encoder, decoder = (blocks[0].feed_forward.router for blocks in (translator.encoder, translator.decoder))
    indices: dict[StochasticRouter, Tensor] = {}
    for router in (encoder, decoder):
        router.register_forward_hook(lambda module, args, out: indices.update({module: out.indices}))
    source = torch.full((40, 2), 5)
    translator.decode(source, translator.encode(source))
    assert not torch.equal(indices[encoder], indices[decoder])


# Training and measuring


def test_training_is_the_same_again_and_its_length_changes_no_step() -> None:
    def weights(steps: int, alpha: float | None) -> Iterator[Tensor]:
        torch.manual_seed(3)
        translator = t.Translator("stochastic")
        for taken in t.train(translator, t.shuffled(few(), 0), steps, alpha=alpha):
            if taken == 2:
                yield translator.embedding.weight.detach().clone()

    (short,), (long,), (consistent,) = weights(2, None), weights(4, None), weights(2, 5.0)
    assert torch.equal(short, long)
    assert not torch.equal(short, consistent)


def test_switch_is_trained_to_balance(monkeypatch: pytest.MonkeyPatch) -> None:
    def gate() -> Tensor:
        torch.manual_seed(1)
        translator = t.Translator("switch")
        for _ in t.train(translator, t.shuffled(few(), 0), 2, alpha=None):
            pass
        return translator.decoder[0].feed_forward.router.weight

    balanced = gate()
    assert torch.equal(gate(), balanced)
    monkeypatch.setattr(t, "gather_losses", lambda model: {})
    assert not torch.equal(gate(), balanced)


@torch.no_grad()
def test_routers_know_what_is_padding() -> None:
    translator = t.Translator("switch")
    batch = t.batch_of([t.pairs("development")[0], t.pairs("development")[-1]])
    masks = []
    for blocks in (translator.encoder, translator.decoder):
        router = blocks[0].feed_forward.router
        router.register_forward_pre_hook(lambda module, args: masks.append(args[1].real))
    translator(batch)
    assert [int(mask.sum()) for mask in masks] == [int((batch.source != t.PAD).sum()), int((batch.labels >= 0).sum())]


@torch.no_grad()
def test_likelihood_is_the_mean_over_all_tokens() -> None:
    translator, data = model("one expert"), few()
    losses, right = [], []
    for source, target in data:
        ids = torch.tensor([t.END, *target])
        logits = translator.decode(ids[None], translator.encode(torch.tensor([[*source, t.END]])))[0][0]
        labels = torch.tensor([*target, t.END])
        losses += F.cross_entropy(logits, labels, reduction="none").tolist()
        right += (logits.argmax(dim=-1) == labels).tolist()
    expected = sum(losses) / len(losses), sum(right) / len(right)
    assert t.likelihood(translator, t.batches(data, 3)) == pytest.approx(expected, abs=1e-4)


def test_scores_of_translations() -> None:
    assert t.bleu_chrf(["a b c d e"], ["a b c d e"]) == pytest.approx((100, 100))
    half, whole = "a b c d", "a b c d e f g h"
    bleu, chrf = t.bleu_chrf([half], [whole])
    assert bleu == pytest.approx(100 * math.exp(1 - 8 / 4))  # every n-gram is right, half of the length is missing
    assert chrf < t.bleu_chrf([whole], [half])[1]  # recall counts more than precision


def test_without_sacrebleu_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install sacrebleu"):
        thor.run(progress=False)


def test_every_translator_is_measured_and_every_claim_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"training": t.pairs("training")[:40], "test": few()}
    monkeypatch.setattr(thor, "pairs", lambda part: short[part])
    monkeypatch.setattr(thor, "greedy", lambda model, ids: t.greedy(model, ids, limit=4))
    rows = Rows()
    thor.translations(rows, seeds=2, steps=3, progress=False)
    models = {row.setting["model"] for row in rows if row.metric == thor.TRANSLATION_NLL}
    longer = {name + thor.LONGER for name in (thor.DENSE, thor.SWITCH)}
    assert models == {*thor.TRANSLATORS, *longer}
    assert {row.setting["model"] for row in rows if row.metric == thor.TRANSLATION_KL} == {thor.LOOSE, thor.TIGHT}
    for row in rows:
        assert len(row.values) == (1 if row.setting["model"] == thor.UNTRANSLATED else 2)
        assert all(math.isfinite(value) for value in row.values)
    for metric in (thor.ACCURACY, thor.NLL, thor.KL):
        for name in (thor.DENSE, thor.SWITCH, *thor.THOR):
            rows.add(metric, {"model": name}, 1.0)
    for name in thor.LM_ROUTERS:
        rows.add(thor.LM_LOSS, {"routing": name}, 1.0)
    rows.add(thor.BLEU, {"model": thor.SWITCH + thor.LONGER}, 1e6, 1e6)
    rows.add(thor.TRANSLATION_NLL, {"model": thor.SWITCH}, -1e6, -1e6)
    claims = {claim.name: claim for claim in thor.claims(rows)}
    assert len(claims) == len(thor.claims(rows))
    assert claims["translation: BLEU gained by alpha 5 on Switch, at the better of its lengths"].measured < -1e5
    assert claims["translation: nats per token of alpha 5 above Switch, at the better of its lengths"].measured > 1e5
    assert abs(claims["translation: BLEU gained by alpha 5 on dense, at the better of its lengths"].measured) <= 100
