"""The language model that is assembled from names: Qwen3-MoE's equal with the standard parts, and a citizen of
transformers with all others."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

import moestro
from moestro.layers import after_step, gather_losses
from moestro.layers.routers import ROUTERS, Router
from moestro.layers.routers.top_k import TopKRouter
from moestro.models.lm import MoELMConfig, MoELMForCausalLM, MoELMModel
from moestro.view.edit import SwitchOff
from native_lm import SMALL, check_generates, check_observed, check_round_trip, check_trains, small_lm, token_ids


def qwen_and_ours(**changes: Any) -> tuple[Any, MoELMForCausalLM]:
    """transformers' model and ours with its weights."""
    sizes = {**SMALL, "initializer_range": 0.2, "norm_topk_prob": True, **changes}
    torch.manual_seed(0)
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).eval()
    ours = MoELMForCausalLM(MoELMConfig(**sizes)).eval()
    state = {name.replace(".mlp.gate.weight", ".mlp.router.weight"): t for name, t in theirs.state_dict().items()}
    ours.load_state_dict(state)
    return theirs, ours


@pytest.mark.parametrize(
    "changes", [{}, {"norm_topk_prob": False}, {"tie_word_embeddings": False, "sliding_window": 5}]
)
def test_it_is_qwen3_moe_with_the_standard_parts(changes: dict[str, Any]) -> None:
    theirs, ours = qwen_and_ours(**changes)
    ids = token_ids()
    with torch.no_grad():
        assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(*(m.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (theirs, ours)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    theirs, ours = qwen_and_ours()
    ids, mask = token_ids(length=70), torch.ones(2, 70, dtype=torch.long)
    mask[0, slice(0, 9) if side == "left" else slice(61, 70)] = 0
    real = mask.bool()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        given = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
        a, b = ours(**given).logits, theirs(**given).logits
        alone = ours(input_ids=ids[:1, real[0]]).logits[0]
    assert_close(a[real], b[real], rtol=1e-4, atol=1e-4)
    assert_close(a[0, real[0]], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [False, True])
def test_it_learns_as_qwen3_moe_does(mask: bool) -> None:
    """Gradients agree, on rows that the fast kernels take and on padded ones that they leave to torch."""
    theirs, ours = qwen_and_ours()
    ids = token_ids(length=128)
    given: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if mask:
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][0, :7] = 0
        given["labels"] = ids.masked_fill(given["attention_mask"] == 0, -100)
    losses = []
    for model in (theirs, ours):
        loss = model.train()(**given, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    assert_close(*losses)
    names = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        expected = names[name.replace(".mlp.router.weight", ".mlp.gate.weight")].grad
        assert_close(p.grad, expected, rtol=2e-3, atol=2e-5, msg=name)


def test_the_fused_loss_is_the_loss() -> None:
    model = small_lm(router_losses={"load_balance": 0.1}).train()
    ids = token_ids()
    labels = ids.masked_fill(ids % 5 == 0, -100)
    results = []
    for fused in (False, True):
        model.config.fused_loss = fused
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, use_cache=False)
        out.loss.backward()
        results.append((out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
        assert (out.logits is None) == fused
    assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert_close(results[1][1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    with torch.no_grad():
        assert model.eval()(input_ids=ids).logits.shape == (2, 12, 61)  # without labels there are always logits


@pytest.mark.parametrize("router", ["top_k", "switch", "sigmoid", "hash", "random", "expert_choice"])
def test_baselines_train_generate_and_reload(router: str, tmp_path: Path) -> None:
    model = small_lm(router=router, router_losses=None if router in ("hash", "random") else {"load_balance": 0.01})
    check_trains(model)
    if router not in ("random", "expert_choice"):
        check_generates(model)  # these two look at more than one token and its past
    out = model.eval().generate(token_ids(length=4), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[0] == 2
    check_round_trip(model, tmp_path)
    check_observed(model)


def test_shared_parts_and_auto_classes(tmp_path: Path) -> None:
    model = small_lm(
        moe_layers=[1],
        shared_intermediate_size=16,
        experts={"kind": "ungated", "activation": "relu2"},
        tie_word_embeddings=True,
    ).eval()
    model.save_pretrained(tmp_path)
    ids = token_ids()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        base = AutoModel.from_pretrained(tmp_path).eval()
        assert isinstance(base, MoELMModel)
        hidden = base(input_ids=ids).last_hidden_state
        assert_close(F.linear(hidden, model.lm_head.weight), model(input_ids=ids).logits)


class OneForAll(TopKRouter):
    """A router whose weight all layers share."""

    def __init__(self, *sizes: int, common: dict[str, Any], **options: Any):
        super().__init__(*sizes, **options)
        first = common.setdefault("router", self)
        self.weight = first.weight


def test_parameters_that_layers_share_are_saved_once_and_tied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROUTERS, "one_for_all", OneForAll)
    model = small_lm(router="one_for_all").eval()
    model.save_pretrained(tmp_path)
    again = MoELMForCausalLM.from_pretrained(tmp_path).eval()
    weights = [layer.mlp.router.weight for layer in again.model.layers]
    assert weights[0] is weights[1]
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_transformers_trainer_takes_it(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8)]
    for fused in (False, True):
        model = small_lm(router_losses={"load_balance": 0.01}, fused_loss=fused)
        before = model.lm_head.weight.detach().clone()
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        result = Trainer(model=model, args=arguments, train_dataset=rows).train()
        assert result.global_step == 2
        assert not torch.equal(before, model.lm_head.weight)


@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_in_parts_takes_the_step_of_the_whole(fused: bool, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in token_ids(4)]

    def step(size: int, parts: int) -> dict[str, torch.Tensor]:
        model = small_lm(router_losses={"router_z": 0.5}, fused_loss=fused)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        return {name: weight.detach() - before[name] for name, weight in model.named_parameters()}

    whole = step(4, 1)
    assert float(whole["model.layers.0.mlp.router.weight"].norm()) > 0
    for name, change in step(1, 4).items():
        assert_close(change, whole[name], atol=1e-5, rtol=1e-4, msg=name)


CHECKPOINTED = [
    {},
    {"fused_loss": True},
    {"router": {"kind": "sigmoid", "bias_rate": 0.01}},
    {"router": "recurrent"},
    {"router": "stochastic", "router_losses": None},
    {"router": "previous_logits"},
    {"router": "temperature"},
    {"router": "attention_aware", "attn_implementation": "eager"},
    {"residual": "heavy_ball"},
    {"residual": "adam_first"},
    {"residual": "robust_momentum"},
]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parts", CHECKPOINTED, ids=str)
def test_checkpointing_keeps_every_gradient_and_counts_once(parts: dict[str, Any], reentrant: bool) -> None:
    ids, found = token_ids(), []
    for checkpointed in (False, True):
        model = small_lm(**{"router_losses": {"load_balance": 1.0, "router_z": 0.1}} | parts).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(3)
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        after = dict(model.named_buffers())
        found.append((out.loss.detach(), gradients, {name: b.clone() for name, b in after.items()}))
    (loss, plain, counted), (same_loss, again, recounted) = found
    assert_close(same_loss, loss)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        rounding = 5e-6 * max(1.0, float(gradient.abs().max()))  # reentrant: sums in another order
        assert_close(again[name], gradient, atol=rounding if reentrant else 1e-6, rtol=1e-5, msg=name)
    for name, buffer in counted.items():
        assert_close(recounted[name], buffer, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_correction_bias_moves_as_without_checkpointing(reentrant: bool) -> None:
    biases = []
    for checkpointed in (False, True):
        model = small_lm(router={"kind": "sigmoid", "bias_rate": 0.01}).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for seed in range(2):  # a part with backward, and one that is only looked at
            out = model(input_ids=token_ids(2 + seed), labels=token_ids(2 + seed), use_cache=False)
            if seed == 0:
                out.loss.backward()
        seen = [layer.mlp.router.slots_seen.clone() for layer in model.model.layers]
        assert [int(slots.sum()) for slots in seen] == [(2 + 3) * 12 * 2] * 2
        after_step(model, 0.5)
        biases.append(torch.stack([layer.mlp.router.e_score_correction_bias for layer in model.model.layers]))
    assert torch.equal(*biases)


def test_routing_is_fp32_in_a_bf16_model() -> None:
    model = small_lm(router_losses={"router_z": 0.01}).bfloat16()
    found = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _m, _a, out: found.append(out))
    ids = token_ids(length=64)
    out = model.train()(input_ids=ids, labels=ids, use_cache=False)
    assert out.logits.dtype == torch.bfloat16
    assert all(r.logits.dtype == r.weights.dtype == torch.float32 for r in found)
    out.loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


def test_it_opens_is_edited_cut_and_saved(tmp_path: Path) -> None:
    view = check_observed(small_lm())
    ids = token_ids()

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    plain = logits(view.model)
    with view.edits(SwitchOff({(0, 1), (1, 2)})):
        edited = logits(view.model)
    assert not torch.equal(edited, plain)
    assert torch.equal(logits(view.model), plain)
    view.keep_experts({layer.index: [0, 2, 3, 5] for layer in view.layers})
    cut = logits(view.model)
    view.save(tmp_path / "cut")
    again = moestro.open(tmp_path / "cut")
    assert [layer.num_experts for layer in again.layers] == [4, 4]
    assert_close(logits(again.model), cut)


@pytest.mark.slow  # a process of its own, which compiles for half a minute
def test_it_compiles() -> None:
    """The standard layer without a graph break where transformers' experts run; the whole model with ours."""
    script = Path(__file__).parent / "compile_plain.py"
    done = subprocess.run([sys.executable, script], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    said = done.stdout.decode().splitlines()
    assert said == ["grouped_mm compiles in one graph", "batched_mm compiles in one graph", "moestro runs"]


@pytest.mark.parametrize("part", ["router", "experts", "block", "residual", "attention"])
def test_an_unknown_name_lists_the_known_ones(part: str) -> None:
    with pytest.raises(ValueError, match=rf"{part}='nobody' is not known; there are \w+"):
        small_lm(**{part: "nobody"})


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k=9 of 8 experts: choose between 1 and 8"):
        small_lm(num_experts_per_tok=9)
    with pytest.raises(ValueError, match="moe_layers names layer 7; there are 2"):
        small_lm(moe_layers=[7])
    with pytest.raises(ValueError, match="loss 'balance' is not known; there are load_balance"):
        small_lm(router_losses={"balance": 1.0})


def test_losses_are_gathered_by_name_and_added_in_training_only() -> None:
    model = small_lm(router_losses={"load_balance": 0.5, "router_z": {"coef": 0.25}}).train()
    ids = token_ids()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    losses = gather_losses(model)
    assert losses.keys() == {"load_balance", "router_z"}
    assert_close(out.aux_loss, sum(losses.values()))
    plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(out.loss, plain + out.aux_loss)
    each = [layer.mlp.losses["load_balance"] for layer in model.model.layers]
    assert_close(losses["load_balance"], sum(each))
    assert model.eval()(input_ids=ids, labels=ids).aux_loss is None


def test_importing_moestro_is_enough_for_auto_classes() -> None:
    code = "import moestro; from transformers import AutoConfig; print(AutoConfig.for_model('moestro_lm').router)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["top_k"]
