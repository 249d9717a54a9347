"""Three experiments, from what must hold exactly to what has to be learned.

- *Exactness*: `solo`, the bundled dense language model, as a union of 4 slices a layer and of its groups of heads, all
  of them chosen: logits on held-out texts and greedy continuations of 16 prompts, in fp32, against the dense model's.
- *Images*: handwritten digits (8 x 8, scikit-learn's) as 16 patches, classified by a dense transformer (2 layers, 4
  heads, 256 neurons); by a union of 4 slices and 4 heads (2 a token, each takes the best half of the patches), with a
  learned gate (straight-through weights) and with the frozen random gate of the paper's released code; and by a plain
  top-2 mixture of 4 such slices behind full attention. Three seeds, the same batches.
- *Language*: small causal models on the embedded sample, dense against a union of 4 slices and 2 groups of heads, half
  of them chosen by causal thresholds. Three seeds, the same rows in the same order.

Counted are multiply-adds of the layers (projections, attention scores, feed-forward parts, gates) from what was really
chosen; embeddings and heads of the models are left out. Not tried, for want of scale: WikiText-103 and LM1B, Long Range
Arena, time and memory on a GPU.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.build.equivalent_split import split_language_model
from moestro.bundled import bundled_path
from moestro.evidence.base import Claim, Evidence, Rows
from moestro.evidence.training import packed, train_lm
from moestro.layers import MoE
from moestro.layers.routers.top_k import TopKRouter
from moestro.models.lm import MoELMConfig
from moestro.models.union_classifier import UnionOfExpertsForSequenceClassification
from moestro.models.union_of_experts import DataSelection, SelectiveAttention
from moestro.routing import RoutingContext, dense_weights
from moestro.view.layers import load
from moestro.view.observe import progress_bar

TITLE = "Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer"
ARXIV = "2503.02495"
CLAIM = (
    "Slices of dense layers and attention heads are experts that add up to the dense model exactly; a union that uses "
    "half of them for half of the tokens keeps the quality at about half the FLOPs."
)
SOURCES = (
    "models/union_of_experts.py",
    "models/union_classifier.py",
    "build/equivalent_split.py",
    "layers/routers/top_k.py",
    "evidence/base.py",
    "evidence/training.py",
    "bundled/solo/model.safetensors",
    "data/sample/*.jsonl.gz",
)
QUICK = {"seeds": 1, "image_steps": 150, "language_steps": 40}
NOT_SHOWN = {
    "digits: accuracy that the union loses to the dense model": (
        "300 steps on 1200 images; tokens that few experts want leave some of the C places empty, so the union runs on "
        "little more than a third of the dense multiply-adds, not on half. It misses the margin by less than its spread"
    ),
    "digits: accuracy that the learned gate loses to the frozen random one": (
        "the learned gate spreads the patches less evenly over the experts than random choices do, and so fills fewer "
        "of their C places (see the multiply-adds); nothing but the straight-through gradient teaches it"
    ),
    "digits: accuracy gained on the plain top-2 mixture": (
        "the plain mixture keeps full attention, and every patch has two slices: nearly twice the multiply-adds"
    ),
    "language: held-out loss above the dense model's, nats": (
        "200 steps: the models have just begun to learn, and two groups of heads leave a token one head group or none; "
        "the paper compares after 200,000 steps, against mixtures"
    ),
}

# Thresholds, stated before the first run.
EXACT = 1e-4  # of the logits
FLOPS = 0.6  # of the dense model's
ACCURACY_LOSS = 0.03
LEARNED_LOSS = 0.005  # what the learned gate may lose to the frozen one
LOSS_MARGIN = 0.1  # nats

DENSE, LEARNED, FROZEN, PLAIN = "dense", "union, learned gate", "union, frozen random gate", "plain top-2"
UNION = "union, causal thresholds"
DIFFERENCE = "largest difference of a logit"
SAME = "share of greedy continuations that are the same"
ACCURACY = "digits: accuracy on the test part"
LOSS = "language: held-out loss, mean over domains, nats per token"
DIGIT_FLOPS = "digits: multiply-adds of the layers, as a part of the dense model's"
TEXT_FLOPS = "language: multiply-adds of the layers, as a part of the dense model's"

IMAGE_SIZE: dict[str, Any] = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_experts=4,
    max_position_embeddings=16,
    experts={"kind": "ungated", "activation": "gelu"},
)
TEST_IMAGES = 597
BATCH = 64
TEXT_UNION: dict[str, Any] = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    router_losses=None,
    block={"kind": "union", "select": "threshold", "capacity": 0.5},
    attention={"kind": "selective", "top_k": 1, "select": "threshold", "capacity": 0.5},
)


def run(*, seeds: int = 3, image_steps: int = 300, language_steps: int = 200, progress: bool = True) -> Evidence:
    """All three experiments; holds the claims against them."""
    rows = Rows()
    exactness(rows)
    images(rows, seeds, image_steps, progress)
    language(rows, seeds, language_steps, progress)
    return Evidence(rows=list(rows), claims=claims(rows))


@torch.no_grad()
def exactness(rows: Rows, prompts: int = 16) -> None:
    path = bundled_path("solo")
    assert path is not None, "solo is part of the package"
    dense: Any = load(path, dtype=torch.float32)[0]
    union: Any = split_language_model(dense, 4)
    texts = packed("heldout")
    ids = texts.ids[:: max(1, len(texts.ids) // prompts)][:prompts]
    setting = {"model": "solo as a union of 4 slices"}
    difference = (dense(input_ids=ids).logits - union(input_ids=ids).logits).abs().max()
    rows.add(DIFFERENCE, setting, float(difference))
    options = dict(max_new_tokens=48, do_sample=False, pad_token_id=0)
    same = [
        torch.equal(dense.generate(row[None, :32], **options), union.generate(row[None, :32], **options)) for row in ids
    ]
    rows.add(SAME, setting, fmean(map(float, same)))


def images(rows: Rows, seeds: int, steps: int, progress: bool) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32) / 16
    patches = pixels.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
    labels = torch.tensor(digits.target)
    with progress_bar(progress) as bar:
        task = bar.add_task("digits", total=seeds * 4 * steps)
        for seed in range(seeds):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
            test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
            work: dict[str, float] = {}
            for name in (DENSE, LEARNED, FROZEN, PLAIN):
                model = image_model(name, seed)
                optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
                draw = torch.Generator().manual_seed(seed)
                model.train()
                for _ in range(steps):
                    batch = train[torch.randint(len(train), (BATCH,), generator=draw)]
                    loss = F.cross_entropy(model(patches[batch]), labels[batch])
                    loss.backward()
                    optimiser.step()
                    optimiser.zero_grad()
                    bar.advance(task)
                model.eval()
                with torch.no_grad():
                    right = model(patches[test]).argmax(dim=-1) == labels[test]
                rows.add(ACCURACY, {"model": name}, float(right.float().mean()))
                work[name] = multiply_adds(model, patches[test])
                rows.add(DIGIT_FLOPS, {"model": name}, work[name] / work[DENSE])


def image_model(name: str, seed: int) -> UnionOfExpertsForSequenceClassification:
    """The models of the image experiment: all four have the same layers, and choose differently among them."""
    torch.manual_seed(seed)
    whole = dict(select="own", weighting="none")
    half = dict(select="top_c", capacity=0.5, weighting="none" if name == FROZEN else "straight_through")
    config: Any = MoELMConfig(**IMAGE_SIZE, num_experts_per_tok=4 if name == DENSE else 2)
    choose = half if name in (LEARNED, FROZEN) else whole
    attention: dict[str, Any] = choose | ({} if choose is whole else {"top_k": 2})
    model = UnionOfExpertsForSequenceClassification(
        config, classes=10, length=16, features=4, attention=attention, block=choose
    )
    if name == PLAIN:
        for layer in model.layers:
            block: Any = layer.block
            layer.block = MoE(TopKRouter(64, 4, 2), block.experts, losses={"load_balance": 0.01})
    return model


def language(rows: Rows, seeds: int, steps: int, progress: bool) -> None:
    models: dict[str, dict[str, Any]] = {DENSE: dict(moe_layers=[], intermediate_size=192), UNION: TEXT_UNION}
    ids = packed("heldout").ids[::40]
    for seed in range(seeds):
        work: dict[str, float] = {}
        for name, config in models.items():
            trained = train_lm(seed=seed, steps=steps, label=name, progress=progress, **config)
            model = trained.model.eval()
            rows.add(LOSS, {"model": name}, trained.mean_heldout)
            work[name] = dense_multiply_adds(model.config, ids)
            if name != DENSE:
                work[name] = multiply_adds(model, input_ids=ids, use_cache=False)
            rows.add(TEXT_FLOPS, {"model": name}, work[name] / work[DENSE])


def dense_multiply_adds(config: Any, ids: Tensor) -> float:
    """Of all layers for one batch: projections, causal attention scores, a gated feed-forward layer."""
    (B, T), H, D = ids.shape, config.hidden_size, config.head_dim
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    a_layer = B * T * (2 * H * D * (heads + kv) + 3 * H * config.intermediate_size) + B * heads * D * T * (T + 1)
    return float(config.num_hidden_layers * a_layer)


@torch.no_grad()
def multiply_adds(model: nn.Module, *inputs: Any, **named: Any) -> float:
    """Of all unions and selective attentions for these inputs; gates count where there is a choice."""
    total = 0.0

    def attention(module: SelectiveAttention, args: Any, kwargs: Any) -> None:
        nonlocal total
        x = args[0] if args else kwargs["hidden_states"]
        H, D, R, G = x.shape[-1], module.head_dim, module.per_group, module.groups
        count = (module.gate.choose(x)[1] != 0).sum(dim=1).double()  # [B, G]
        pairs = count * (count + 1) / 2 if module.causal else count.square()
        total += float((count * 2 * H * D * (R + 1) + pairs * 2 * R * D).sum())
        total += 0 if _takes_all(module.gate) else x.shape[0] * x.shape[1] * H * G

    def block(module: MoE, args: Any, kwargs: Any) -> None:
        nonlocal total
        x = args[0]
        context = RoutingContext(shape=(x.shape[0], x.shape[1]))
        experts: Any = module.experts
        slots = (dense_weights(module.router(x.flatten(0, 1), context), experts.num_experts) != 0).sum()
        total += float(slots) * sum(w[0].numel() for w in experts.parameters())
        total += 0 if _takes_all(module.router) else x.flatten(0, 1).numel() * experts.num_experts

    kinds: dict[type, Any] = {SelectiveAttention: attention, MoE: block}
    hooks = [m.register_forward_pre_hook(kinds[type(m)], with_kwargs=True) for m in model.modules() if type(m) in kinds]
    try:
        model(*inputs, **named)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _takes_all(router: Any) -> bool:
    return isinstance(router, DataSelection) and router.select == "own" and router.top_k == router.num_experts


def claims(rows: Rows) -> list[Claim]:
    """What the paper's claims come to here."""
    solo = {"model": "solo as a union of 4 slices"}

    def mean(metric: str, name: str) -> float:
        return rows.mean(metric, {"model": name})

    return [
        Claim(
            name="all slices and heads: largest difference of a logit",
            measured=rows.mean(DIFFERENCE, solo),
            relation="<=",
            needed=EXACT,
        ),
        Claim(
            name="all slices and heads: share of greedy continuations that are the same",
            measured=rows.mean(SAME, solo),
            relation=">=",
            needed=1.0,
        ),
        Claim(
            name="digits: multiply-adds of the union, as a part of the dense model's",
            measured=mean(DIGIT_FLOPS, LEARNED),
            relation="<=",
            needed=FLOPS,
        ),
        Claim(
            name="digits: accuracy that the union loses to the dense model",
            measured=mean(ACCURACY, DENSE) - mean(ACCURACY, LEARNED),
            relation="<=",
            needed=ACCURACY_LOSS,
        ),
        Claim(
            name="digits: accuracy that the learned gate loses to the frozen random one",
            measured=mean(ACCURACY, FROZEN) - mean(ACCURACY, LEARNED),
            relation="<=",
            needed=LEARNED_LOSS,
        ),
        Claim(
            name="digits: accuracy gained on the plain top-2 mixture",
            measured=mean(ACCURACY, LEARNED) - mean(ACCURACY, PLAIN),
            relation=">",
            needed=0,
        ),
        Claim(
            name="language: multiply-adds of the causal union, as a part of the dense model's",
            measured=mean(TEXT_FLOPS, UNION),
            relation="<=",
            needed=FLOPS,
        ),
        Claim(
            name="language: held-out loss above the dense model's, nats",
            measured=mean(LOSS, UNION) - mean(LOSS, DENSE),
            relation="<=",
            needed=LOSS_MARGIN,
        ),
    ]
