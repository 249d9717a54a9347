"""A trained dense model made a mixture of experts by the importance of its neurons, to be distilled from it.

    I_j      = sum over rows x of | w1_j . dL(x)/dw1_j  +  w2_j . dL(x)/dw2_j |  w1_j, w2_j: weights in and out of j
    expert e = the S most important neurons, and every E-th of the rest from the e-th on, W neurons in all

so that every expert has a copy of the neurons that matter most, and its share of the next. Together they have
S + E (W - S) of the I neurons; the least important ones are left out. Which expert a token takes is up to the router:
token ids hashed (the paper's), a softmax gate, or a tree.

"MoEBERT: from BERT to Mixture-of-Experts via Importance-Guided Adaptation" (arXiv:2204.07675). With trees: "COMET:
Learning Cardinality Constrained Mixture of Experts with Trees and Local Search" (arXiv:2306.02824). There each expert
also has its own copy of the output bias, and of residual and norm after it; here these are shared, and gate weights
apply to the feed-forward part alone.
Shapes: E experts, I neurons of the dense layer, W of an expert, H hidden, B rows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from moestro.build.equivalent_split import split_ffn
from moestro.build.in_place import DenseFFN, InnerMoE, find_ffns, hand_contexts, select_neurons
from moestro.directories import complete_directory
from moestro.layers.kinds import Kind, make, named
from moestro.layers.routers import ROUTERS

WEIGHTS, DESCRIPTION = "student.safetensors", "student.json"
"""Names that transformers does not look for: it would build the dense class, and draw its neurons anew."""


def neuron_importance(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[Any, Any], Float[Tensor, ""]]
) -> list[Float[Tensor, " i"]]:
    """I of every feed-forward layer of `model`, in eval mode; the model is left as it was.

    `loss(model, batch)` is the sum over the batch's rows: each row then counts as it would alone.

    Raises ValueError for no batches, or a model that `find_ffns` refuses.
    """
    ffns = find_ffns(model)
    total = [torch.zeros(ffn.width, device=ffn.output.weight.device) for ffn in ffns]
    seen: list[dict[nn.Module, Tensor]] = [{} for _ in ffns]
    hooks = [hook for ffn, values in zip(ffns, seen) for hook in _watch(ffn, values)]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    was_training, count = model.training, 0
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        for batch in batches:
            count += 1
            with torch.enable_grad():
                value = loss(model, batch)
            grads = iter(torch.autograd.grad(value, [x for values in seen for x in values.values()]))
            for importance, values in zip(total, seen):
                importance += _by_row(sum(x.detach().float() * next(grads).float() for x in values.values()))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.train(was_training)
    if not count:
        raise ValueError("no batches: importance is a sum over data")
    return total


def _watch(ffn: DenseFFN, values: dict[nn.Module, Tensor]) -> list[Any]:
    """Hooks that keep w1 . x of every map in, and the activations that go into the map out.

    w1_j . dL/dw1_j of a row is the sum over its tokens of (w1_j . x) dL/d(w1_j . x); for w2_j it is that of the
    activation times its gradient.
    """

    def keep_inner(linear: nn.Module, args: Any, out: Tensor) -> Tensor:
        bias: Any = linear.bias
        values[linear] = out if bias is None else out - bias
        return values[linear] if bias is None else values[linear] + bias

    def keep_activation(linear: nn.Module, args: Any) -> None:
        values[linear] = args[0]

    inner = [linear.register_forward_hook(keep_inner) for linear in ffn.inputs]
    return [*inner, ffn.output.register_forward_pre_hook(keep_activation)]


def _by_row(product: Any) -> Float[Tensor, " i"]:
    """Sum over rows of the size of each row's sum over tokens."""
    return product.reshape(product.shape[0], -1, product.shape[-1]).sum(dim=1).abs().sum(dim=0)


def deal_neurons(
    importance: Float[Tensor, " i"], num_experts: int, expert_size: int, shared: int = 0
) -> Int[Tensor, "e w"]:
    """Which neurons each expert has: the `shared` most important ones first, then its own, in order of importance.

    Raises ValueError where the layer has too few neurons, or the expert no place for those it shares.
    """
    width, own = len(importance), expert_size - shared
    if not importance.isfinite().all():
        raise ValueError(f"{int((~importance.isfinite()).sum())} of {width} importances are not finite")
    if num_experts < 1 or expert_size < 1 or shared < 0:
        raise ValueError(f"num_experts={num_experts}, expert_size={expert_size}, shared={shared}: at least 1, 1 and 0")
    if shared > expert_size:
        raise ValueError(f"shared={shared} neurons do not fit an expert of {expert_size}; share at most {expert_size}")
    if shared + num_experts * own > width:
        raise ValueError(
            f"{num_experts} experts of {expert_size} neurons, {shared} of them shared, take "
            f"{shared + num_experts * own}; the layer has {width}. Share more, or make the experts smaller"
        )
    order = importance.argsort(descending=True, stable=True)
    dealt = order[shared : shared + num_experts * own].view(own, num_experts).T
    return torch.cat([order[:shared].expand(num_experts, -1), dealt], dim=1)


@torch.no_grad()
def split_by_importance(
    dense: Any,
    importance: Sequence[Float[Tensor, " i"]] | None,
    num_experts: int = 4,
    *,
    expert_size: int | None = None,
    shared: int = 0,
    router: Kind = "comet",
    top_k: int = 1,
    losses: Mapping[str, Any] | None = None,
) -> Any:
    """A copy of `dense` with a MoE in the place of every feed-forward layer; the dense model stays as it is.

    `router` is a name in ROUTERS, with its options; `losses` as for MoE. expert_size None: the layer's width divided by
    `num_experts`, so that with shared=0 the experts together are the layer. importance None: neurons in their order.
    `base_model.progress` and `moestro.layers.after_step` tell routers how far a training is; `gather_losses` has
    their losses, which the model's own loss leaves out. `save_student` and `load_student` write and read it.

    Raises ValueError for sizes that do not fit, a router that is not known or refuses its options, importances that are
    not those of the model's layers, or a model that `find_ffns` refuses.
    """
    ffns = find_ffns(dense)
    importance = [-torch.arange(f.width, dtype=torch.float32) for f in ffns] if importance is None else importance
    _check_importance(ffns, importance)
    if getattr(dense.config, "chunk_size_feed_forward", 0):
        raise ValueError("chunk_size_feed_forward cuts a batch behind the routers' back: set it to 0")
    if expert_size is None and (odd := [f for f in ffns if num_experts < 1 or f.width % num_experts]):
        raise ValueError(f"{num_experts} experts do not divide the {odd[0].width} neurons of {odd[0].name}")
    sizes = [f.width // num_experts if expert_size is None else expert_size for f in ffns]
    dealt = [deal_neurons(i, num_experts, size, shared) for i, size in zip(importance, sizes)]
    make_router, options = named(ROUTERS, router, "router")
    offered: dict[str, Any] = {"vocab_size": getattr(dense.config, "vocab_size", None), "normalize": True, "common": {}}
    routers = [
        make(make_router, f.output.out_features, num_experts, top_k, options=options, offered=offered) for f in ffns
    ]
    student = copy.deepcopy(dense)
    for layer, (ffn, neurons, gate) in enumerate(zip(ffns, dealt, routers)):
        union = split_ffn(select_neurons(ffn.mlp, neurons.reshape(-1)), num_experts)
        moe = InnerMoE(gate, union.experts, union.shared, losses=losses, layer=layer)
        ffn.replace(student, moe.to(ffn.output.weight))
    hand_contexts(student.train(dense.training))
    student.split = {
        "num_experts": num_experts,
        "expert_size": expert_size,
        "shared": shared,
        "router": router,
        "top_k": top_k,
        "losses": None if losses is None else dict(losses),
    }
    return student


def save_student(student: Any, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a split model to directory `path`, whole or not at all: config, class, how it was split, weights.

    `load_student` reads it. transformers' `from_pretrained` refuses it: no class of its own has these experts.

    Raises FileExistsError where the directory is there and `overwrite` is off, OSError where the disk cannot hold it.
    """
    made = {"class": type(student).__name__, "dtype": str(student.dtype).removeprefix("torch."), "split": student.split}
    size = sum(t.nbytes for t in student.state_dict().values())
    with complete_directory(path, overwrite=overwrite, size=size, known_by=DESCRIPTION, kind="a student") as half:
        student.config.save_pretrained(half)
        (half / DESCRIPTION).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        save_model(student, str(half / WEIGHTS))
    return Path(path)


def load_student(directory: str | Path) -> Any:
    """The model that `save_student` wrote, in eval mode. Raises FileNotFoundError where there is none."""
    import transformers

    path = Path(directory)
    if not (path / DESCRIPTION).is_file():
        raise FileNotFoundError(f"{path} has no {DESCRIPTION}: it was not written by `save_student`")
    made = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    dense = getattr(transformers, made["class"])(transformers.AutoConfig.from_pretrained(path))
    for parameter in dense.parameters():  # buffers keep their type, as they do where transformers loads a model
        parameter.data = parameter.data.to(getattr(torch, made["dtype"]))
    student = split_by_importance(dense, None, **made["split"])
    load_model(student, str(path / WEIGHTS))
    return student.eval()


@torch.no_grad()
def cut_by_importance(dense: Any, importance: Sequence[Float[Tensor, " i"]], width: int) -> Any:
    """A copy of `dense` with the `width` most important neurons of every feed-forward layer; it stays a dense model.

    Raises ValueError for a width out of range, or what `split_by_importance` refuses of the model and importances.
    """
    ffns = find_ffns(dense)
    _check_importance(ffns, importance)
    kept = [deal_neurons(i, 1, width)[0] for i in importance]
    student = copy.deepcopy(dense)
    for ffn, neurons in zip(ffns, kept):
        ffn.put(student, select_neurons(ffn.mlp, neurons))
    student.config.intermediate_size = width
    return student


def _check_importance(ffns: Sequence[DenseFFN], importance: Sequence[Tensor]) -> None:
    widths, given = [f.width for f in ffns], [len(i) for i in importance]
    if widths != given:
        raise ValueError(f"importances of {given} neurons; the model's feed-forward layers have {widths}")
