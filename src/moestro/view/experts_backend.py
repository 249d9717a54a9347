"""The `moestro` experts backend of transformers: every expert of a layer in a few batched matrix products.

For token n and its slot k with expert e = indices[n, k]:

    u[n, k] = hidden[n] @ up[e] + up_bias[e]
    a[n, k] = gate(u[n, k])                              e.g. SwiGLU: silu(u_gate) * u_up
    y[n, k] = norm(a[n, k] @ down[e] + down_bias[e])     bias and norm where the family has them
    out[n]  = sum over k of weights[n, k] * y[n, k]      fp32 sum

Steps on CPU:
1. Sort the slots by expert, once. Neighbouring experts that serve a similar number of tokens form a *group*; its
   experts are padded to one capacity C. Each (expert, place) is a *row*; rows of all groups make one buffer.
2. Per group: gather the tokens [G, C, H], one batched product up, the gate, one batched product down. All of a
   group's intermediates stay in the cache.
3. Combine: every token adds up its K rows, weighted, without an intermediate [N, K, H].
4. Backward takes the same steps by hand. It writes each expert's weight gradient straight into its place (autograd
   over slices would fill and add one full-size tensor per expert), and it gets the gate weights' gradient from
   a . (grad_out @ down^T), so y is neither kept nor recomputed.

Elsewhere (GPU) the same layer is written with torch's grouped matrix product and autograd.

Shapes: N tokens, K slots per token, S slots that have an expert (N*K without sentinels), E experts, H hidden,
I expert width, U = 2I (gated) or I, P rows in the buffer, G experts in a group, C rows per expert of a group.
Weights are handled as [E, in, out] views, whichever way the family stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

# token [S], slot [S], outputs [S, H]: outputs before gate weights, sorted by expert, sentinels left out.
OnOutputs = Callable[[Tensor, Tensor, Tensor], None]

# Experts share a batched product while padding adds at most this share of rows.
MAX_PADDING = 0.25
MAX_GROUP = 8
# Rows of one group: bounds what is in flight, so that a group's intermediates stay in the last-level cache.
MAX_GROUP_ROWS = 4096


def experts_forward(
    module: nn.Module,
    hidden: Float[Tensor, "n h"],
    indices: Int[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    *,
    on_outputs: OnOutputs | None = None,
) -> Float[Tensor, "n h"]:
    """Output of an experts module; `on_outputs` sees each slot's output before it is weighted.

    Slots with an index >= num_experts are sentinels: they add nothing, and their weight gets a zero gradient.
    `on_outputs(token [S], slot [S], outputs [S, H])` is called once or several times per forward with detached
    tensors in expert order; gradient checkpointing runs a forward, and so the calls, twice.
    """
    family = _family(module, hidden)
    forward = _forward_groups if hidden.device.type == "cpu" else _forward_grouped_mm
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(family, hidden, indices, weights, on_outputs)


def moestro_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor):
    """The form in which transformers calls an experts backend."""
    return experts_forward(self, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register("moestro", moestro_experts_forward)


# --- what a family's experts module says about itself ---------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    up: Tensor  # [E, H, U]
    down: Tensor  # [E, I, H]
    up_bias: Tensor | None  # [E, U]
    down_bias: Tensor | None  # [E, H]
    gate: Callable[[Tensor], Tensor]  # [..., U] -> [..., I]
    norm: Callable[[Tensor], Tensor] | None
    is_swiglu: bool
    others: tuple[Tensor, ...]  # parameters of gate and norm
    dtype: torch.dtype  # of the matrix products


def _family(module: Any, hidden: Tensor) -> _Family:
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, up_name), module.down_proj
    up_bias = getattr(module, f"{up_name}_bias") if module.has_bias else None
    down_bias = module.down_proj_bias if module.has_bias else None
    own = {id(p) for p in (up, down, up_bias, down_bias)}
    device = hidden.device.type
    return _Family(
        up=up if module.is_transposed else up.transpose(1, 2),
        down=down if module.is_transposed else down.transpose(1, 2),
        up_bias=up_bias,
        down_bias=down_bias,
        gate=module._apply_gate if module.has_gate else module.act_fn,
        norm=module.post_expert_norm if module.has_post_expert_norm else None,
        is_swiglu=module.has_gate
        and type(module)._apply_gate is _default_apply_gate
        and type(module.act_fn).__name__ in ("SiLUActivation", "SiLU"),
        others=tuple(p for p in module.parameters() if id(p) not in own),
        dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else up.dtype,
    )


# --- CPU: groups of experts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Experts lo..hi-1, C rows each, at rows start..stop-1; their slots are slots.start..slots.stop-1 in order."""

    lo: int
    hi: int
    start: int
    stop: int
    slots: slice

    def view(self, rows: Tensor) -> Tensor:
        """This group's part of a tensor over rows, as [G, C, ...]."""
        return rows[self.start : self.stop].unflatten(0, (self.hi - self.lo, -1))


@dataclass(frozen=True)
class _Plan:
    groups: list[_Group]
    order: Tensor  # [S] flat slot n*K+k of each sorted slot
    row: Tensor  # [S] its row
    token: Tensor  # [P] token of each row; a padding row repeats a token of its expert, with weight zero
    place: Tensor  # [N, K] row of each slot; P for a sentinel


def _capacity(count: int) -> int:
    """Rows reserved for `count` tokens.

    Rounded to few distinct values: oneDNN compiles a kernel for each new shape, which takes longer than running it.
    """
    step = 16
    while count > 8 * step:
        step *= 2
    return -(-count // step) * step


def _grouped(counts: list[int], lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
    """(lo, hi, capacity) of groups that cover the experts lo..hi-1 which have tokens."""
    capacity, total = _capacity(max(counts[lo:hi])), sum(counts[lo:hi])
    if total == 0:
        return
    rows = (hi - lo) * capacity
    if hi - lo == 1 or (hi - lo <= MAX_GROUP and rows <= MAX_GROUP_ROWS and rows <= (1 + MAX_PADDING) * total):
        yield lo, hi, capacity
        return
    # Halving, not cutting at the best place: sizes stay 1, 2, 4, 8 and shapes few.
    middle = lo + (1 << (hi - lo - 1).bit_length() - 1)
    yield from _grouped(counts, lo, middle)
    yield from _grouped(counts, middle, hi)


def _plan(indices: Tensor, num_experts: int) -> _Plan:
    n, k = indices.shape
    flat = indices.reshape(-1)
    counts = torch.bincount(flat, minlength=num_experts)[:num_experts].tolist()
    groups, row_of_expert, capacities = [], [0] * num_experts, [0] * num_experts
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + count)
    rows = 0
    for lo, hi, capacity in _grouped(counts, 0, num_experts) if ends[-1] else ():
        groups.append(_Group(lo, hi, rows, rows + (hi - lo) * capacity, slice(ends[lo], ends[hi])))
        for e in range(lo, hi):
            row_of_expert[e], capacities[e] = rows, capacity
            rows += capacity
    order = flat.argsort(stable=True)[: ends[-1]]
    shift = torch.tensor([r - s for r, s in zip(row_of_expert, ends)])
    row = torch.arange(ends[-1]) + shift.repeat_interleave(torch.tensor(counts))
    slot_token = order // k if k else order
    first = torch.tensor([min(s, ends[-1] - 1) for s in ends[:-1]])
    token = slot_token[first.repeat_interleave(torch.tensor(capacities))] if rows else slot_token
    token[row] = slot_token
    place = torch.full((n * k,), rows)
    place[order] = row
    return _Plan(groups, order, row, token, place.view(n, k))


def _forward_groups(
    family: _Family, hidden: Tensor, indices: Tensor, weights: Tensor, on_outputs: OnOutputs | None
) -> Tensor:
    inputs = (hidden, weights, family.up, family.down, family.up_bias, family.down_bias, *family.others)
    plan = _plan(indices, family.up.shape[0])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Experts.apply(family, plan, on_outputs, *inputs)
    return _run_groups(family, plan, hidden, weights, on_outputs, None)


def _run_groups(
    family: _Family, plan: _Plan, hidden: Tensor, weights: Tensor, on_outputs: OnOutputs | None, kept: Tensor | None
) -> Tensor:
    """Forward over the groups; `kept` [P, U], if given, receives the up-projections for the backward."""
    rows, k, dtype = len(plan.token), weights.shape[1], family.dtype
    x = hidden.to(dtype)
    y = torch.empty(rows + 1, hidden.shape[1], dtype=dtype)
    y[rows] = 0  # what sentinels add
    for group in plan.groups:
        experts = slice(group.lo, group.hi)
        up, down = family.up[experts].to(dtype), family.down[experts].to(dtype)
        u = _product(_gather(x, group.view(plan.token)), up, None if kept is None else group.view(kept))
        if family.up_bias is not None:
            u += family.up_bias[experts, None]
        a = _swiglu(u) if family.is_swiglu else family.gate(u)
        out = _product(a, down, group.view(y))
        if family.down_bias is not None:
            out += family.down_bias[experts, None]
        if family.norm is not None:
            out.copy_(family.norm(out))
        if on_outputs is not None:
            slots = plan.order[group.slots]
            on_outputs(slots // k, slots % k, y[plan.row[group.slots]])
    return _combine(y, plan.place, weights).to(hidden.dtype)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, family, plan, on_outputs, hidden, weights, up, down, up_bias, down_bias, *others):
        u = torch.empty(len(plan.token), up.shape[2], dtype=family.dtype)
        out = _run_groups(family, plan, hidden, weights, on_outputs, u)
        ctx.save_for_backward(hidden, weights, u, up, down, up_bias, down_bias, *others)
        ctx.family, ctx.plan = family, plan
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        hidden, weights, u_all, up, down, up_bias, down_bias, *others = ctx.saved_tensors
        family, plan, dtype = ctx.family, ctx.plan, ctx.family.dtype
        need_hidden, need_weights, need_up, need_down, need_up_bias, need_down_bias, *need_others = (
            ctx.needs_input_grad[3:]
        )
        rows = len(plan.token)
        x, g_out = hidden.to(dtype), grad_out.to(dtype)
        # Padding rows carry gate weight zero, and so add nothing to any gradient.
        gate_weight = weights.new_zeros(rows)
        gate_weight[plan.row] = weights.reshape(-1)[plan.order]

        d_x = torch.empty(rows + 1, x.shape[1], dtype=dtype) if need_hidden else None
        d_gate_weight = weights.new_zeros(rows + 1)
        d_up, d_down = _weight_grad(up, need_up, plan), _weight_grad(down, need_down, plan)
        d_up_bias, d_down_bias = (
            _weight_grad(up_bias, need_up_bias, plan),
            _weight_grad(down_bias, need_down_bias, plan),
        )
        d_others: list[Tensor | None] = [torch.zeros_like(p) if need else None for p, need in zip(others, need_others)]

        for group in plan.groups:
            experts = slice(group.lo, group.hi)
            token, w = group.view(plan.token), group.view(gate_weight)[..., None].to(dtype)
            u, g = group.view(u_all), _gather(g_out, token)
            a = _swiglu(u) if family.is_swiglu else family.gate(u)
            w_down = down[experts].to(dtype)
            if family.norm is not None:
                y = torch.bmm(a, w_down)
                if down_bias is not None:
                    y += down_bias[experts, None]
                group.view(d_gate_weight)[:] = (family.norm(y) * g).sum(-1)
                g = _vjp(family.norm, y, others, g * w, d_others)
                w = torch.ones_like(w)
                d_a = torch.bmm(g, w_down.transpose(1, 2))
            else:
                d_a = torch.bmm(g, w_down.transpose(1, 2))
                d_w = (a * d_a).sum(-1, dtype=gate_weight.dtype)
                if down_bias is not None:
                    d_w += torch.bmm(g, down_bias[experts, :, None].to(dtype))[..., 0]
                group.view(d_gate_weight)[:] = d_w
            if d_down is not None:
                _product_into(d_down[experts], (a * w).transpose(1, 2), g)
            if d_down_bias is not None:
                d_down_bias[experts] = torch.bmm(w.transpose(1, 2), g)[:, 0]
            if not (need_hidden or need_up or need_up_bias or any(need_others)):
                continue
            d_a *= w
            d_u = _swiglu_vjp(u, d_a) if family.is_swiglu else _vjp(family.gate, u, others, d_a, d_others)
            if d_up is not None:
                _product_into(d_up[experts], _gather(x, token).transpose(1, 2), d_u)
            if d_up_bias is not None:
                d_up_bias[experts] = d_u.sum(1)
            if d_x is not None:
                _product(d_u, up[experts].to(dtype).transpose(1, 2), group.view(d_x))

        d_hidden = None
        if d_x is not None:
            d_x[rows] = 0
            d_hidden = _combine(d_x, plan.place, None).to(hidden.dtype)
        d_weights = d_gate_weight[plan.place] if need_weights else None
        return None, None, None, d_hidden, d_weights, d_up, d_down, d_up_bias, d_down_bias, *d_others


# --- the parts ------------------------------------------------------------------------------------------------------


def _gather(tokens: Float[Tensor, "n h"], token: Int[Tensor, "g c"]) -> Float[Tensor, "g c h"]:
    return tokens.index_select(0, token.reshape(-1)).view(*token.shape, -1)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out[g] = a[g] @ b[g], written in place, for either storage order and any dtype of `out`."""
    if out.dtype != a.dtype:
        out.copy_(torch.bmm(a, b))
    elif out.is_contiguous():
        torch.bmm(a, b, out=out)
    else:
        torch.bmm(b.transpose(1, 2), a.transpose(1, 2), out=out.transpose(1, 2))


def _combine(y: Float[Tensor, "p h"], place: Int[Tensor, "n k"], weights: Float[Tensor, "n k"] | None) -> Tensor:
    """sum over k of weights[n, k] * y[place[n, k]], accumulated in fp32 (or fp64)."""
    n, k = place.shape
    if n == 0 or k == 0:
        return y.new_zeros(n, y.shape[1])
    if weights is not None:
        # A sentinel's weight may be anything, also NaN.
        weights = weights.masked_fill(place == len(y) - 1, 0).to(y.dtype)
    return F.embedding_bag(place, y, mode="sum", per_sample_weights=weights)


def _weight_grad(weight: Tensor | None, needed: bool, plan: _Plan) -> Tensor | None:
    """Room for a weight's gradient; only experts without tokens need zeros, the others are written whole."""
    if weight is None or not needed:
        return None
    grad = torch.empty_like(weight)
    end = 0
    for group in [*plan.groups, None]:
        grad[end : group.lo if group else len(grad)].zero_()
        end = group.hi if group else end
    return grad


def _swiglu(u: Tensor) -> Tensor:
    gate, up = u.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_vjp(u: Tensor, grad: Tensor) -> Tensor:
    gate, up = u.chunk(2, dim=-1)
    d_u = torch.empty_like(u)
    d_gate, d_up = d_u.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate), out=d_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
    return d_u


def _vjp(fn: Callable[[Tensor], Tensor], x: Tensor, params: list, grad: Tensor, d_params: list) -> Tensor:
    """Gradient of fn at x; adds the parameters' gradients to `d_params` where one is wanted."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        wanted = [i for i, d in enumerate(d_params) if d is not None]
        d_x, *ds = torch.autograd.grad(fn(x), [x, *(params[i] for i in wanted)], grad, allow_unused=True)
    for i, d in zip(wanted, ds):
        if d is not None:
            d_params[i] += d
    return d_x


# --- GPU: torch's grouped matrix product ----------------------------------------------------------------------------


def _forward_grouped_mm(
    family: _Family, hidden: Tensor, indices: Tensor, weights: Tensor, on_outputs: OnOutputs | None
) -> Tensor:
    """The layer with one grouped product per projection and autograd; no copy from device to host."""
    k, num_experts = indices.shape[1], family.up.shape[0]
    sorted_experts, order = indices.reshape(-1).clamp(max=num_experts).sort(stable=True)
    ends = torch.searchsorted(sorted_experts, torch.arange(num_experts, device=hidden.device), right=True)
    offsets = ends.to(torch.int32)
    # Rows past offsets[-1] belong to sentinels: the kernel leaves them unwritten, so they are masked on both sides.
    sentinel = (sorted_experts == num_experts)[:, None]
    expert = sorted_experts.clamp(max=num_experts - 1)

    x = hidden.to(family.dtype)[order // k].masked_fill(sentinel, 0)
    u = F.grouped_mm(x, family.up.to(family.dtype), offs=offsets).masked_fill(sentinel, 0)
    if family.up_bias is not None:
        u = u + family.up_bias.to(u.dtype)[expert]
    y = F.grouped_mm(family.gate(u), family.down.to(family.dtype), offs=offsets).masked_fill(sentinel, 0)
    if family.down_bias is not None:
        y = y + family.down_bias.to(y.dtype)[expert]
    if family.norm is not None:
        y = family.norm(y)
    if on_outputs is not None:
        slots = order[: int(ends[-1])]
        on_outputs(slots // k, slots % k, y.detach()[: len(slots)])
    gated = y.masked_fill(sentinel, 0) * weights.reshape(-1)[order, None].masked_fill(sentinel, 0)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    out = gated[place].view(*indices.shape, -1).sum(1, dtype=torch.promote_types(gated.dtype, torch.float32))
    return out.to(hidden.dtype)
