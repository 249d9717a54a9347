"""Find the RoutingRule of a router by watching what it does, and measure how well the rule fits.

A router is called on random hidden states. Every rule that its attributes allow (groups, correction biases, per-expert
scales) is applied to the logits it returned, until one gives its own weights and indices. Biases are perturbed while
probing, so that a rule which ignores one cannot pass because the checkpoint happens to hold zeros.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moestro.layers.routers.base import Router
from moestro.routing import Routing, RoutingRule, Score, dense_weights

PROBE_TOKENS = 128

_silence = threading.local()


@contextmanager
def silence() -> Iterator[None]:
    """Let no edit or observer see what this thread runs inside the block: probing shows the model as it is."""
    before, _silence.on = silenced(), True
    try:
        yield
    finally:
        _silence.on = before


def silenced() -> bool:
    """Whether this thread probes."""
    return getattr(_silence, "on", False)


TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest accepted difference of a gate weight, relative to the largest weight of the probe."""


class RouterCall:
    """Calls one router alone, whatever its forward wants beside the hidden states.

    Further required arguments are taken from the block's attributes of the same name (a correction bias, say), and
    random token ids where it asks for `input_ids`.
    """

    def __init__(self, block: nn.Module, router: nn.Module):
        self.block, self.router = block, router
        matrix = next((p for p in router.parameters() if p.dim() == 2), None)
        if matrix is not None:
            self.hidden_size = matrix.shape[1]
        elif isinstance(router, Router):  # it reads the experts' weights, say
            matrix, self.hidden_size = next(block.parameters()), router.hidden_size
        else:
            raise TypeError("a router without a weight matrix")
        self.dtype, self.device = matrix.dtype, matrix.device
        parameters = list(inspect.signature(router.forward).parameters.values())[1:]
        self.extra = [p.name for p in parameters if p.name == "input_ids" or hasattr(block, p.name)]
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in self.extra and p.kind < 2]
        if missing:
            raise TypeError(f"unknown arguments {missing}")

    @property
    def by_token_id(self) -> bool:
        return "input_ids" in self.extra

    def hidden(self, seed: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(PROBE_TOKENS, self.hidden_size, generator=generator) * scale
        return hidden.to(self.device, self.dtype)

    def __call__(self, hidden: Tensor, swapped: dict[tuple[nn.Module, str], Tensor] | None = None) -> Routing:
        """The triple for hidden [N, H]; `swapped` replaces tensors of the router or block for this call only."""
        swapped = swapped or {}
        kwargs: dict[str, Any] = {}
        for name in self.extra:
            if name == "input_ids":
                kwargs[name] = torch.arange(len(hidden), device=hidden.device).reshape(1, -1) % self._vocabulary()
            else:
                kwargs[name] = swapped.get((self.block, name), getattr(self.block, name))
        inside = {
            name: swapped[owner, attr] for name, owner, attr in named_tensors(self.router) if (owner, attr) in swapped
        }
        error: Exception | None = None
        training = self.router.training
        self.router.eval()  # some draw at random while they train
        try:
            for shaped in (hidden, hidden.unsqueeze(0)):  # most routers flatten; some insist on [B, T, H]
                try:
                    with torch.no_grad(), silence():
                        out = functional_call(self.router, inside, (shaped,), kwargs)
                    return _as_triple(out, len(hidden))
                except (ValueError, RuntimeError, IndexError, TypeError) as e:
                    error = error or e
        finally:
            self.router.train(training)
        raise TypeError(f"does not act as a router: {error}")

    def _vocabulary(self) -> int:
        table = next(t for _, t in self.router.named_buffers() if not t.is_floating_point())
        return len(table)


def _as_triple(out: Any, tokens: int) -> Routing:
    if not isinstance(out, tuple) or len(out) < 3 or not all(isinstance(t, Tensor) for t in out[:3]):
        raise TypeError(f"returned {type(out).__name__}, not (logits, weights, indices)")
    logits, weights, indices = (t.reshape(-1, t.shape[-1]) for t in out[:3])
    if not (len(logits) == len(weights) == len(indices) == tokens and weights.shape == indices.shape):
        raise TypeError(f"shapes {[tuple(t.shape) for t in out[:3]]} for {tokens} tokens")
    if indices.is_floating_point() or not weights.is_floating_point():
        raise TypeError("weights and indices are not in the places 1 and 2")
    return Routing(logits, weights, indices)


def named_tensors(module: nn.Module, recurse: bool = True) -> Iterator[tuple[str, nn.Module, str]]:
    """(qualified name, owner, attribute) of every parameter and buffer."""
    for prefix, owner in module.named_modules() if recurse else [("", module)]:
        for attr in [*owner._parameters, *owner._buffers]:
            if getattr(owner, attr) is not None:
                yield (f"{prefix}.{attr}" if prefix else attr), owner, attr


def per_expert_vectors(block: nn.Module, router: nn.Module, sizes: set[int]) -> list[tuple[nn.Module, str]]:
    """Vectors with one number per expert, in the router or handed to it by the block: (owner, attribute)."""
    found = [*named_tensors(router), *named_tensors(block, recurse=False)]
    return [
        (owner, attr)
        for _, owner, attr in found
        if (t := getattr(owner, attr)).numel() in sizes and max(t.shape) in sizes and t.is_floating_point()
    ]


def derive_rule(call: RouterCall, num_experts: int, like: RoutingRule | None = None) -> RoutingRule:
    """The rule that reproduces the router, trying the style of `like` (the layer before) first.

    Raises ValueError with the best attempt and its difference where none does.
    """
    router, block = call.router, call.block
    first = call(call.hidden(0))
    spread = first.logits.float().std().item()
    scale = min(max(2.0 / max(spread, 1e-6), 1e-3), 1e4)
    classes = first.logits.shape[1]
    vectors = per_expert_vectors(block, router, {num_experts, classes})
    generator = torch.Generator().manual_seed(2)
    noisy = {
        (owner, attr): (
            getattr(owner, attr).detach()
            + 0.3 * torch.randn(getattr(owner, attr).shape, generator=generator).to(getattr(owner, attr))
        )
        for owner, attr in vectors
    }
    truth = call(call.hidden(1, scale), noisy)
    base = RoutingRule(
        top_k=truth.indices.shape[1],
        null_experts=classes - num_experts,
        returns_probabilities=_are_probabilities(truth.logits),
    )
    best: tuple[float, RoutingRule] = (float("inf"), base)
    candidates = _candidates(base, router, vectors)
    if like is not None:
        candidates = itertools.chain(_rebound(like, base, vectors), candidates)
    for candidate in candidates:
        rule = _probed(candidate, noisy)
        fitted = replace(candidate, scale=_measured_scale(rule, truth, num_experts))
        error = difference(replace(rule, scale=fitted.scale), truth, num_experts)
        if error < best[0]:
            best = (error, fitted)
        if error <= TOLERANCE.get(truth.weights.dtype, 2e-2):
            return _same_rounding(fitted, noisy, truth, num_experts)
    raise ValueError(
        f"no known routing rule reproduces {type(router).__name__}: the nearest one ({best[1].describe()}) differs in "
        f"gate weights by {best[0]:.2g} of the largest weight"
    )


def _candidates(base: RoutingRule, router: nn.Module, vectors: list[tuple[nn.Module, str]]) -> Iterator[RoutingRule]:
    getters = [None, *(partial(getattr, owner, attr) for owner, attr in vectors)]
    # A vector usually is there to be used: try the uses before the rules without it.
    roles = sorted(
        (pair for pair in itertools.product(getters, getters) if pair[0] is None or pair[0] is not pair[1]),
        key=lambda pair: (pair[0] is None) + (pair[1] is not None),
    )
    groups = _int_attribute(router, ("num_group", "n_group", "num_expert_group"))
    top_groups = _int_attribute(router, ("topk_group",))
    limits: list[dict[str, Any]] = [{}]
    if groups > 1 and top_groups >= 1:
        limits = [
            dict(groups=groups, top_groups=top_groups, group_score=score, group_fill=fill)
            for score in ("top2", "max")
            for fill in (float("-inf"), 0.0)
        ] + limits
    for fp32 in (True, False):
        for (bias, expert_scale), limit in itertools.product(roles, limits):
            for score, normalize in itertools.product(get_args(Score), (True, False)):
                for choose_on in ("score", "logits") if bias is not None else ("score",):
                    yield replace(
                        base,
                        score=score,
                        normalize=normalize,
                        choose_on=choose_on,
                        fp32=fp32,
                        bias=bias,
                        expert_scale=expert_scale,
                        **limit,
                    )
    if base.top_k == 2:
        yield replace(base, sparsemixer=float(getattr(router, "router_jitter_noise", 0.01)))


def _same_rounding(
    rule: RoutingRule, noisy: dict[tuple[nn.Module, str], Tensor], truth: Routing, num_experts: int
) -> RoutingRule:
    """Of the ways to compute one and the same rule, that which comes nearest to the router."""
    chosen = (False, True) if rule.score == "softmax" and rule.normalize and not rule.null_experts else (False,)
    ways = [
        replace(rule, fp32=fp32, softmax_of_chosen=of_chosen)
        for fp32 in (rule.fp32, not rule.fp32)
        for of_chosen in chosen
    ]
    return min(ways, key=lambda way: difference(replace(_probed(way, noisy), scale=way.scale), truth, num_experts))


def _rebound(like: RoutingRule, base: RoutingRule, vectors: list[tuple[nn.Module, str]]) -> Iterator[RoutingRule]:
    """`like` of another layer with its biases replaced by this layer's of the same names."""

    def rebind(getter: Callable[[], Tensor] | None) -> Callable[[], Tensor] | None:
        if getter is None:
            return None
        return next((partial(getattr, owner, attr) for owner, attr in vectors if attr == getter.args[1]), None)  # type: ignore[attr-defined]

    bias, expert_scale = rebind(like.bias), rebind(like.expert_scale)
    if (like.bias is None) == (bias is None) and (like.expert_scale is None) == (expert_scale is None):
        yield replace(
            like,
            top_k=base.top_k,
            null_experts=base.null_experts,
            returns_probabilities=base.returns_probabilities,
            bias=bias,
            expert_scale=expert_scale,
        )


def _probed(rule: RoutingRule, noisy: dict[tuple[nn.Module, str], Tensor]) -> RoutingRule:
    """`rule` reading the perturbed vectors in place of the live ones."""

    def at(getter: Callable[[], Tensor] | None) -> Callable[[], Tensor] | None:
        return None if getter is None else partial(noisy.__getitem__, getter.args)  # type: ignore[attr-defined]

    return replace(rule, scale=1.0, bias=at(rule.bias), expert_scale=at(rule.expert_scale))


def logits_of(rule: RoutingRule, returned: Tensor) -> Tensor:
    """The logits behind what the router returned in their place."""
    return returned.log() if rule.returns_probabilities else returned


def _measured_scale(rule: RoutingRule, truth: Routing, num_experts: int) -> float:
    """The constant between the rule's weights and the router's, 1 where they agree to rounding."""
    ours = dense_weights(rule(logits_of(rule, truth.logits)), num_experts).float()
    theirs = dense_weights(truth, num_experts).float()
    both = (ours.abs() > 1e-6) & (theirs.abs() > 1e-6)
    if not both.any():
        return 1.0
    ratio = (theirs[both] / ours[both]).median().item()
    return 1.0 if abs(ratio - 1) < 1e-2 and truth.weights.dtype != torch.float32 else round(ratio, 6)


def difference(rule: RoutingRule, truth: Routing, num_experts: int) -> float:
    """Largest difference of a gate weight between rule and router, relative to the largest weight.

    Tokens whose choice hangs on a tie (possible in bf16) are left out, unless they are more than a tenth of all.
    """
    routed = rule(logits_of(rule, truth.logits))
    theirs = dense_weights(truth, num_experts).float()
    ours = dense_weights(routed, num_experts).float()
    error = (ours - theirs).abs().amax(dim=1)
    scale = theirs.abs().max().clamp_min(1e-12)
    if truth.logits.dtype in (torch.bfloat16, torch.float16):
        error = error.sort().values[: int(len(error) * 0.9)]
    return (error.max() / scale).nan_to_num(float("inf")).item()


def _are_probabilities(logits: Tensor) -> bool:
    total = logits.float().sum(dim=-1)
    return bool((logits >= 0).all() and torch.allclose(total, torch.ones_like(total), atol=1e-3))


def _int_attribute(module: nn.Module, names: tuple[str, ...]) -> int:
    return next((int(v) for name in names if (v := getattr(module, name, None)) is not None), 0)
