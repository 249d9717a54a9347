"""MoEBERT: a split model is the dense one where every expert is taken, and its routers know what they must."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    OPTConfig,
    OPTModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from families.tiny import build
from moestro.build.in_place import InnerMoE, find_ffns, select_neurons
from moestro.build.moebert import (
    cut_by_importance,
    deal_neurons,
    load_student,
    neuron_importance,
    save_student,
    split_by_importance,
)
from moestro.layers import after_step, gather_losses
from moestro.layers.routers import ROUTERS, Router
from moestro.layers.routers.comet import CometRouter
from moestro.routing import Routing, RoutingContext
from tiny import hooks_on, same_state, state_of

H, I, L, VOCAB = 16, 24, 2, 50
SIZES = dict(hidden_size=H, intermediate_size=I, num_hidden_layers=L, num_attention_heads=2, vocab_size=VOCAB)


def bert(**options: Any) -> Any:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3, initializer_range=0.3, **options))
    return model.eval()


def roberta() -> Any:
    torch.manual_seed(0)
    return RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=20)).eval()


def qwen3() -> Any:
    torch.manual_seed(0)
    sizes = dict(num_key_value_heads=1, head_dim=8, initializer_range=0.3, eos_token_id=None)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **sizes)).eval()


MODELS = {"bert": bert, "roberta": roberta, "qwen3": qwen3}


def batch(rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """The last row is padded by two."""
    ids = torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def last(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(**(inputs or batch()))
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def any_importance(model: Any) -> list[Tensor]:
    return [torch.rand(ffn.width) for ffn in find_ffns(model)]


class Everyone(Router):
    """Every expert, with weight 1; keeps the contexts that it was given."""

    no_rule = "all are chosen"

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.contexts: list[RoutingContext] = []

    def forward(self, hidden: Tensor, context: RoutingContext | None = None) -> Routing:
        assert context is not None
        self.contexts.append(context)
        everyone = torch.arange(self.num_experts).expand(len(hidden), -1)
        return Routing(torch.zeros(everyone.shape), torch.ones(everyone.shape), everyone)


@pytest.fixture
def everyone(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(ROUTERS, "everyone", Everyone)
    return "everyone"


# Importance


class OneLayer(nn.Module):
    """y = relu(x W1 + b1) W2 on numbers; 2 neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Module()
        self.ffn.fc1, self.ffn.fc2, self.ffn.act = nn.Linear(1, 2), nn.Linear(2, 1, bias=False), nn.ReLU()
        self.ffn.forward = lambda x: self.ffn.fc2(self.ffn.act(self.ffn.fc1(x)))
        with torch.no_grad():
            self.ffn.fc1.weight.copy_(torch.tensor([[2.0], [-1.0]]))
            self.ffn.fc1.bias.copy_(torch.tensor([0.5, 3.0]))
            self.ffn.fc2.weight.copy_(torch.tensor([[1.0, 3.0]]))


def test_importance_of_two_neurons_by_hand() -> None:
    # row x=1: activations 2.5 and 2; w1 . dL/dw1 = 2 * 1 and -1 * 3, w2 . dL/dw2 = 2.5 and 6: 4.5 and 3
    # row x=-1, counted negatively: activations 0 and 4; w1 . dL/dw1 = 0 and -3, w2 . dL/dw2 = 0 and -12: 0 and 15
    model, x, sign = OneLayer(), torch.tensor([[[1.0]], [[-1.0]]]), torch.tensor([1.0, -1.0])
    (found,) = neuron_importance(model, [(x, sign)], lambda m, b: (m.ffn.forward(b[0])[:, 0, 0] * b[1]).sum())
    torch.testing.assert_close(found, torch.tensor([4.5, 18.0]))


@pytest.mark.parametrize("make", [bert, qwen3])
def test_importance_is_the_equation_row_by_row(make: Any) -> None:
    model, inputs = make(), batch()

    def loss(m: Any, one: dict[str, Tensor]) -> Tensor:
        return (m(**one).logits.square().flatten(1).sum(dim=1)).sum()

    found = neuron_importance(model, [inputs], loss)
    expected = [torch.zeros(I) for _ in range(L)]
    for row in range(3):
        model.zero_grad()
        loss(model, {name: tensor[row : row + 1] for name, tensor in inputs.items()}).backward()
        for layer, ffn in enumerate(find_ffns(model)):
            into = sum((m.weight * m.weight.grad).sum(dim=1) for m in ffn.inputs)
            expected[layer] += (into + (ffn.output.weight * ffn.output.weight.grad).sum(dim=0)).abs().detach()
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert min(i.std() for i in found) > 0


def test_importance_adds_up_over_batches_and_leaves_the_model_alone() -> None:
    model, loss = bert(), lambda m, one: m(**one).logits[:, 0].sum()
    model.train().requires_grad_(False)
    before = state_of(model)
    first, second = batch(seed=1), batch(seed=2)
    parts = [neuron_importance(model, [one], loss) for one in (first, second)]
    for together, a, b in zip(neuron_importance(model, [first, second], loss), *parts):
        torch.testing.assert_close(together, a + b)
    assert model.training
    assert hooks_on(model) == 0
    assert same_state(model, before)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="no batches"):
        neuron_importance(model, [], loss)


# Dealing


def test_shared_neurons_are_in_every_expert_and_the_rest_is_dealt_in_turn() -> None:
    dealt = deal_neurons(torch.tensor([5.0, 1, 7, 3, 0, 6, 2, 4]), 2, 4, shared=2)  # order: 2 5 0 7 3 6 1 4
    assert dealt.tolist() == [[2, 5, 0, 3], [2, 5, 7, 6]]  # 1 and 4, the least important, are left out


@pytest.mark.parametrize(("experts", "size", "shared"), [(1, 24, 0), (4, 6, 0), (4, 9, 5), (3, 8, 8), (24, 1, 0)])
def test_every_deal_holds_what_it_says(experts: int, size: int, shared: int) -> None:
    importance = torch.rand(I)
    dealt = deal_neurons(importance, experts, size, shared)
    assert dealt.shape == (experts, size)
    common, own = dealt[:, :shared], dealt[:, shared:].flatten().tolist()
    assert (common == importance.argsort(descending=True)[:shared]).all()
    assert len(set(own)) == len(own)
    assert not set(own) & set(common[0].tolist())
    left = sorted(set(range(I)) - set(dealt.flatten().tolist()))
    assert not left or importance[left].max() < importance[dealt.flatten()].min()


@pytest.mark.parametrize(
    ("experts", "size", "shared", "message"),
    [
        (2, 4, 5, "shared=5 neurons do not fit an expert of 4"),
        (4, 9, 3, "take 27; the layer has 24"),
        (0, 4, 0, "num_experts=0"),
        (2, 0, 0, "expert_size=0"),
        (2, 4, -1, "shared=-1"),
    ],
)
def test_deals_that_cannot_be_are_refused(experts: int, size: int, shared: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deal_neurons(torch.rand(I), experts, size, shared)
    with pytest.raises(ValueError, match="1 of 24 importances are not finite"):
        deal_neurons(torch.rand(I).index_fill(0, torch.tensor([3]), torch.nan), 2, 4)


# Splitting


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("experts", [1, 4, 24])
def test_all_experts_together_are_the_dense_model(name: str, experts: int, everyone: str) -> None:
    dense = MODELS[name]()
    before, logits = state_of(dense), last(dense)
    student = split_by_importance(dense, any_importance(dense), experts, router=everyone)
    assert sum(isinstance(m, InnerMoE) for m in student.modules()) == L
    torch.testing.assert_close(last(student), logits, rtol=1e-4, atol=1e-4)
    assert not any(m.training for m in student.modules()), "as the dense model"
    assert same_state(dense, before)
    assert torch.equal(last(dense), logits)
    assert hooks_on(dense) == 0


@pytest.mark.parametrize("make", [bert, qwen3])
def test_each_expert_is_its_neurons_of_the_dense_layer(make: Any, everyone: str) -> None:
    dense = make()
    importance = any_importance(dense)
    student = split_by_importance(dense, importance, 3, expert_size=10, shared=4, router=everyone)
    moes = [m for m in student.modules() if isinstance(m, InnerMoE)]
    for ffn, moe, scores in zip(find_ffns(dense), moes, importance):
        dealt, hidden = deal_neurons(scores, 3, 10, 4), torch.randn(5, H)
        for expert in range(3):
            alone = select_neurons(ffn.mlp, dealt[expert])
            one = torch.full((5, 1), expert)
            got = moe.experts(hidden, one, torch.ones(5, 1)) + (moe.shared(hidden) if hasattr(moe, "shared") else 0)
            torch.testing.assert_close(got, alone(hidden), rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(last(student), last(dense), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("router", ["comet", "switch", "hash", {"kind": "permuted", "router": "comet", "steps": 3}])
def test_students_train_and_their_gates_learn(router: Any) -> None:
    dense = bert()
    student = split_by_importance(
        dense, any_importance(dense), expert_size=8, shared=4, router=router, losses={"load_balance": 0.1}
    ).train()
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-2)
    labels, values = torch.tensor([0, 1, 2]), []
    for step in range(12):
        student.base_model.progress = step / 12
        loss = student(**batch(), labels=labels).loss
        optimiser.zero_grad()
        (loss + sum(gather_losses(student).values())).backward()
        if router != "hash" and step == 0:
            gates = {n: p for n, p in student.named_parameters() if ".router." in n}
            assert gates
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates.values())
        optimiser.step()
        after_step(student, (step + 1) / 12)
        values.append(float(loss.detach()))
    assert values[-1] < 0.7 * values[0]
    searches = [m.search for m in student.modules() if hasattr(m, "search")]
    assert all(search.frozen for search in searches)


def test_routers_know_what_the_model_was_called_with(everyone: str) -> None:
    dense = bert()
    student = split_by_importance(dense, any_importance(dense), router=everyone)
    student.base_model.progress = 0.25
    inputs = batch()
    last(student, **inputs)
    routers = [m for m in student.modules() if isinstance(m, Everyone)]
    contexts = [r.contexts[-1] for r in routers]
    assert [c.layer for c in contexts] == [0, 1]
    for context in contexts:
        assert context.shape == (3, 7)
        assert torch.equal(context.mask, inputs["attention_mask"].bool())
        assert torch.equal(context.input_ids, inputs["input_ids"])
        assert context.progress == 0.25
    assert contexts[0].state is contexts[1].state
    with torch.no_grad():
        student(inputs_embeds=torch.randn(2, 5, H))
    assert routers[0].contexts[-1].shape == (2, 5)
    assert routers[0].contexts[-1].input_ids is None
    twin = copy.deepcopy(student)
    last(twin, **batch(rows=2))
    assert routers[0].contexts[-1].shape == (2, 5), "a copy's forward is none of the original's business"


def test_nothing_is_handed_on_after_a_forward_also_a_failed_one(everyone: str) -> None:
    dense = bert()
    student = split_by_importance(dense, any_importance(dense), router=everyone)
    moe = next(m for m in student.modules() if isinstance(m, InnerMoE))
    last(student)
    assert moe.handed is None
    with pytest.raises(IndexError):
        student(input_ids=torch.tensor([[VOCAB + 1]]))
    assert moe.handed is None


def test_padding_and_progress_reach_the_trees() -> None:
    dense = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    student = split_by_importance(dense, any_importance(dense), router={"kind": "comet", "ramp": 0.5}).train()

    def entropy(progress: float, inputs: dict[str, Tensor]) -> float:
        student.base_model.progress = progress
        student(**inputs)
        return float(gather_losses(student)["leaf_entropy"])

    padded = batch(rows=1)
    short = {name: tensor[:, :5] for name, tensor in padded.items()}
    assert entropy(1.0, padded) == pytest.approx(entropy(1.0, short), rel=1e-5)
    assert entropy(0.25, padded) == pytest.approx(entropy(1.0, padded) / 2, rel=1e-5)
    assert entropy(0.0, padded) == 0


def test_hash_routing_goes_by_token_id() -> None:
    dense = bert()
    student = split_by_importance(dense, any_importance(dense), router="hash")
    router = next(m for m in student.modules() if isinstance(m, Router))
    chosen = []
    router.register_forward_hook(lambda module, args, out: chosen.append(out.indices))
    inputs = batch()
    last(student, **inputs)
    assert torch.equal(chosen[0], router.table[inputs["input_ids"].flatten()])


def test_a_causal_student_generates_the_same_with_and_without_a_cache() -> None:
    dense = qwen3()
    student = split_by_importance(dense, any_importance(dense), router="comet")
    ids = batch(rows=1)["input_ids"][:, :5]
    cached, whole = (student.generate(ids, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, whole)


# Cutting, saving


def test_a_cut_model_keeps_the_most_important_neurons_and_is_a_plain_checkpoint(tmp_path: Path) -> None:
    for dense, family in ((bert(), BertForSequenceClassification), (qwen3(), Qwen3ForCausalLM)):
        importance = any_importance(dense)
        torch.testing.assert_close(last(cut_by_importance(dense, importance, I)), last(dense), rtol=1e-4, atol=1e-4)
        cut = cut_by_importance(dense, importance, 7)
        for before, after, scores in zip(find_ffns(dense), find_ffns(cut), importance):
            kept = scores.argsort(descending=True)[:7]
            assert torch.equal(after.output.weight, before.output.weight[:, kept])
        assert dense.config.intermediate_size == I
        cut.save_pretrained(tmp_path / family.__name__)
        assert torch.equal(last(family.from_pretrained(tmp_path / family.__name__)), last(cut))
    with pytest.raises(ValueError, match="take 25; the layer has 24"):
        cut_by_importance(dense, importance, 25)


@pytest.mark.parametrize("router", ["comet", "hash", {"kind": "permuted", "router": "comet", "steps": 3}])
@pytest.mark.parametrize("make", [bert, qwen3])
def test_a_saved_student_comes_back_whole(make: Any, router: Any, tmp_path: Path) -> None:
    dense = make()
    student = split_by_importance(dense, any_importance(dense), expert_size=8, shared=4, router=router).eval()
    for module in student.modules():
        if isinstance(module, CometRouter):
            module.harden()
    after_step(student, 0.5)
    loaded = load_student(save_student(student, tmp_path / "student"))
    assert type(loaded) is type(dense)
    assert same_state(loaded, state_of(student))
    assert torch.equal(last(loaded), last(student))


def test_a_student_in_bfloat16_comes_back_whole(tmp_path: Path) -> None:
    qwen3().save_pretrained(tmp_path / "dense")
    dense = Qwen3ForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)  # its rotary buffer is fp32
    student = split_by_importance(dense, any_importance(dense))
    save_student(student, tmp_path / "student")
    assert torch.equal(last(load_student(tmp_path / "student")), last(student))


def test_only_load_student_reads_a_saved_student(tmp_path: Path) -> None:
    dense = bert()
    student = split_by_importance(dense.bfloat16(), any_importance(dense))
    with pytest.raises(FileExistsError, match="overwrite"):
        save_student(student, tmp_path)
    save_student(student, tmp_path, overwrite=True)
    assert load_student(tmp_path).dtype == torch.bfloat16
    with pytest.raises(OSError, match="no file named"):
        BertForSequenceClassification.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "student.json").read_text())["class"] == "BertForSequenceClassification"
    (tmp_path / "student.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no student\.json"):
        load_student(tmp_path)


# What is refused


def test_models_without_a_known_layer_are_refused_with_what_was_looked_for() -> None:
    sizes = dict(hidden_size=H, ffn_dim=I, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB)
    model = OPTModel(OPTConfig(**sizes, word_embed_proj_dim=H))  # its fc1 and fc2 are the decoder layer's own
    with pytest.raises(ValueError, match=r"OPTModel has no feed-forward layer that is known: looked for .*fc1.*dense"):
        find_ffns(model)
    with pytest.raises(ValueError, match=r"Qwen3MoeForCausalLM has experts already, at model\.layers\.1\.mlp\.experts"):
        find_ffns(build("qwen3_moe").model)
    dense = bert()
    with pytest.raises(ValueError, match="has experts already"):
        find_ffns(split_by_importance(dense, any_importance(dense)))


def test_a_layer_that_computes_something_else_is_refused() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(H, I), nn.Linear(I, H), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(2 * F.gelu(self.fc1(x)))

    with pytest.raises(ValueError, match=r"^0 differs from its two or three linear maps"):
        find_ffns(nn.Sequential(Doubled()))


def test_splits_that_cannot_be_are_refused() -> None:
    dense = bert()
    scores = any_importance(dense)
    for options, message in (
        ({"num_experts": 5}, "5 experts do not divide the 24 neurons of bert.encoder.layer.0.intermediate"),
        ({"num_experts": 0}, "0 experts do not divide the 24 neurons"),
        ({"expert_size": 0}, "expert_size=0"),
        ({"expert_size": 6, "shared": 7}, "shared=7 neurons do not fit an expert of 6"),
        ({"top_k": 5}, "top_k=5 of 4 experts"),
        ({"router": "tree"}, "router='tree' is not known; there are"),
        ({"router": {"kind": "comet", "gamma": 0.0}}, "gamma=0.0"),
        ({"losses": {"balance": 1.0}}, "loss 'balance' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            split_by_importance(dense, scores, **options)
    for wrong in (scores[:1], [*scores[:1], torch.rand(23)]):
        with pytest.raises(ValueError, match=r"the model's feed-forward layers have \[24, 24\]"):
            split_by_importance(dense, wrong)
        with pytest.raises(ValueError, match=r"the model's feed-forward layers have \[24, 24\]"):
            cut_by_importance(dense, wrong, 8)
    with pytest.raises(ValueError, match="chunk_size_feed_forward"):
        split_by_importance(bert(chunk_size_feed_forward=2), scores)


def test_gradient_checkpointing_is_refused_in_training() -> None:
    dense = bert()
    student = split_by_importance(dense, any_importance(dense))
    student.gradient_checkpointing_enable()
    last(student)
    with pytest.raises(ValueError, match="under gradient checkpointing: turn it off"):
        student.train()(**batch())
