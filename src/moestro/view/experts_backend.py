"""The `moestro` experts backend of transformers: all experts of a layer in a few batched matrix products.

For token n and its slot k with expert e = indices[n, k]:

    u[n, k] = hidden[n] @ up[e] + up_bias[e]
    a[n, k] = gate(u[n, k])                              e.g. SwiGLU: silu(u_gate) * u_up
    y[n, k] = norm(a[n, k] @ down[e] + down_bias[e])     bias and norm where the family has them
    out[n]  = sum over k of weights[n, k] * y[n, k]      summed in fp32

Steps on CPU:
1. Sort the slots by expert, once. Neighbouring experts that serve similar numbers of tokens form a *group*: they are
   padded to one capacity C and share one batched product. The rows of all groups make one buffer.
2. For a *chunk* of groups that fits the cache: gather the tokens, product up, gate, product down.
3. Combine: every token adds up its K rows, weighted, without an intermediate [N, K, H].
4. The backward takes the same steps by hand. It writes each expert's weight gradient straight into its place
   (autograd over slices would fill and add one full-size tensor per expert), and it takes the gradient of the gate
   weights from a . (grad_out @ down^T), so that y is neither kept nor recomputed.

A few slots (decoding) are computed one by one. Other devices: see experts_grouped_mm.

Shapes: N tokens, K slots per token, S slots that have an expert (N*K without sentinels), E experts, H hidden,
I expert width, U = 2I (gated) or I; P rows of the buffer, R rows of a chunk, G experts of a group, C rows of each.
Expert weights are handled as views [E, in, out], whichever way a family stores them.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moestro.view.experts_family import Family, OnOutputs, read_family, swiglu, with_pullback
from moestro.view.experts_grouped_mm import forward_grouped_mm

# Up to this many slots are computed one by one: sorting would take longer than it saves.
FEW_SLOTS = 16
# Hidden rows of one chunk; with its other intermediates it fits the last-level cache.
CHUNK_BYTES = 2 << 20
# Per-slot outputs that a forward without gradients holds at a time (it takes the tokens in blocks), and rows handed
# to `on_outputs` at a time.
OUTPUT_BYTES = 256 << 20
CALLBACK_ROWS = 4096
# Overhead of one matrix product, in multiply-adds that would take as long (about 20 microseconds), and what a
# product of one expert loses against a batch that every thread takes an equal part of.
CALL_COST = {2: 4_000_000, 4: 1_000_000, 8: 500_000}  # by bytes per element
SINGLE_PENALTY = 1.05
# Buffers from this size on, which malloc takes from the kernel anew each time, ask for huge pages: faults of 4 KB pages
# in a layer's weight gradients cost as much time as the products that fill them.
HUGE_BUFFER_BYTES = 32 << 20
HUGE_PAGE_BYTES = 2 << 20


def experts_forward(
    module: nn.Module,
    hidden: Float[Tensor, "n h"],
    indices: Int[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    *,
    on_outputs: OnOutputs | None = None,
) -> Float[Tensor, "n h"]:
    """Output of an experts module; `on_outputs` sees each slot's output before it is weighted.

    Slots with the index num_experts are sentinels: they add nothing, and their weight gets a zero gradient. Any other
    index that no expert has raises ValueError (on a GPU, where that would wait for the device, its assertion fails).
    `on_outputs(token [S], slot [S], outputs [S, H])` is called any number of times per forward, each time with
    detached tensors in expert order. Gradient checkpointing runs a forward, and so these calls, twice.
    """
    family = read_family(module, hidden)
    if hidden.device.type != "cpu":
        forward = forward_grouped_mm
    elif indices.numel() <= FEW_SLOTS and not _wants_gradients(family, hidden, weights):
        forward = _forward_slots
    else:
        forward = _forward_groups
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(family, hidden, indices, weights, on_outputs)


@torch.compiler.disable  # how many tokens an expert serves decides about shapes: compiled models break the graph here
def moestro_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The form in which transformers calls an experts backend."""
    return experts_forward(self, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register("moestro", moestro_experts_forward)


def _check_last(largest: int, num_experts: int) -> None:
    if largest > num_experts:
        raise ValueError(
            f"a slot names expert {largest}; there are experts 0 to {num_experts - 1}, and {num_experts} marks a slot "
            "as unused"
        )


def _inputs(family: Family, hidden: Tensor, weights: Tensor) -> tuple[Tensor | None, ...]:
    return (hidden, weights, family.up, family.down, family.up_bias, family.down_bias, *family.others)


def _wants_gradients(family: Family, hidden: Tensor, weights: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in _inputs(family, hidden, weights))


# --- CPU: which rows and which products -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Experts lo..hi-1, C rows each, at rows start..stop-1 of the buffer."""

    lo: int
    hi: int
    start: int
    stop: int

    @property
    def experts(self) -> slice:
        return slice(self.lo, self.hi)

    def of(self, rows: Tensor, first: int) -> Tensor:
        """[G, C, ...] of this group, from a tensor over rows that begins at row `first` of the buffer."""
        return rows[self.start - first : self.stop - first].unflatten(0, (self.hi - self.lo, -1))


@dataclass(frozen=True)
class _Plan:
    chunks: list[list[_Group]]
    order: Tensor  # [S] flat slot n*K+k of each slot, in expert order
    row: Tensor  # [S] its row
    token: Tensor  # [P] token of each row; a padding row repeats a token of its expert, with weight zero
    place: Tensor  # [N, K] row of each slot; P for a sentinel


def _plan(indices: Int[Tensor, "n k"], family: Family) -> _Plan:
    n, k = indices.shape
    num_experts, h, _ = family.up.shape
    flat = indices.reshape(-1)
    counts = torch.bincount(flat, minlength=num_experts).tolist()  # refuses negative indices
    _check_last(len(counts) - 1, num_experts)
    counts = counts[:num_experts]

    chunks: list[list[_Group]] = []
    starts, capacities = [0] * num_experts, [0] * num_experts
    rows = 0
    for lo, hi, capacity in _cheapest_groups(counts, family):
        group = _Group(lo, hi, rows, rows + (hi - lo) * capacity)
        for e in range(lo, hi):
            starts[e], capacities[e] = rows, capacity
            rows += capacity
        if chunks and (group.stop - chunks[-1][0].start) * h * family.dtype.itemsize <= CHUNK_BYTES:
            chunks[-1].append(group)
        else:
            chunks.append([group])

    count = torch.tensor(counts)
    end = count.cumsum(0)
    order = flat.argsort(stable=True)[: int(end[-1])]
    row = torch.arange(len(order)) + (torch.tensor(starts) - end + count).repeat_interleave(count)
    slot_token = order // max(k, 1)
    token = slot_token[(end - 1).repeat_interleave(torch.tensor(capacities))]
    token[row] = slot_token
    place = torch.full((n * k,), rows)
    place[order] = row
    return _Plan(chunks, order, row, token, place.view(n, k))


def _cheapest_groups(counts: list[int], family: Family) -> list[tuple[int, int, int]]:
    """(lo, hi, capacity) of groups that cover the experts with tokens, at the least estimated cost.

    Candidates are the nodes of a binary tree over the experts: sizes are powers of two, so that shapes are few.
    A node costs its rows G * C and one call; it is split where its two halves cost less.
    """
    _, h, u = family.up.shape
    call = CALL_COST[family.dtype.itemsize] / (h * u)
    alone = SINGLE_PENALTY if torch.get_num_threads() > 1 else 1.0
    nodes = []  # cost, capacity (0: cannot grow), groups
    for e, count in enumerate(counts):
        capacity = _capacity(count, family.dtype)
        nodes.append((alone * capacity + call, capacity, [(e, e + 1, capacity)]) if count else (0.0, 0, []))
    size = 1
    while len(nodes) > 1:
        size *= 2
        if len(nodes) % 2:
            nodes.append((0.0, 0, []))
        halves, nodes = nodes, []
        for (cost_l, capacity_l, groups_l), (cost_r, capacity_r, groups_r) in zip(halves[::2], halves[1::2]):
            capacity, lo = max(capacity_l, capacity_r), len(nodes) * size
            if capacity_l and capacity_r and size * capacity + call < cost_l + cost_r:
                nodes.append((size * capacity + call, capacity, [(lo, lo + size, capacity)]))
            else:
                nodes.append((cost_l + cost_r, 0, groups_l + groups_r))
    return nodes[0][2]


def _capacity(count: int, dtype: torch.dtype) -> int:
    """Rows for `count` tokens.

    In 16-bit types one of few values: oneDNN compiles a kernel for every new shape, which takes longer than to run it.
    """
    if dtype.itemsize > 2:
        return count
    bits = max(count - 1, 0).bit_length()
    step = 1 << max(bits - 5, 3) if count > 16 else 1 << bits
    return -(-count // step) * step


# --- CPU: forward and backward over chunks --------------------------------------------------------------------------


def _forward_groups(
    family: Family, hidden: Tensor, indices: Tensor, weights: Tensor, on_outputs: OnOutputs | None
) -> Tensor:
    if _wants_gradients(family, hidden, weights):
        plan = _plan(indices, family)
        return _Experts.apply(family, plan, on_outputs, *_inputs(family, hidden, weights))
    n, k = indices.shape
    block = max(1, OUTPUT_BYTES // (max(k, 1) * hidden.shape[1] * family.dtype.itemsize))
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    for lo in range(0, n, block):
        tokens = slice(lo, lo + block)

        def report(token: Tensor, slot: Tensor, outputs: Tensor, lo: int = lo) -> None:
            if on_outputs is not None:
                on_outputs(token + lo, slot, outputs)

        plan = _plan(indices[tokens], family)
        out[tokens] = _run_chunks(
            family, plan, hidden[tokens], weights[tokens], report if on_outputs is not None else None
        )
    return out


def _run_chunks(
    family: Family,
    plan: _Plan,
    hidden: Tensor,
    weights: Tensor,
    on_outputs: OnOutputs | None,
    kept_u: Float[Tensor, "p u"] | None = None,
) -> Tensor:
    """The forward; `kept_u` receives the up-projections that the backward needs."""
    rows, k, dtype = len(plan.token), weights.shape[1], family.dtype
    tokens = hidden.to(dtype)
    y_all = _empty(rows + 1, hidden.shape[1], dtype=dtype)
    y_all[rows] = 0  # a sentinel's output
    for chunk in plan.chunks:
        first, stop = chunk[0].start, chunk[-1].stop
        x = tokens.index_select(0, plan.token[first:stop])
        u = kept_u[first:stop] if kept_u is not None else x.new_empty(len(x), family.up.shape[2])
        for group in chunk:
            _linear(group, first, x, family.up, family.up_bias, out=u)
        a = swiglu(u)[0] if family.is_swiglu else family.gate(u)
        y = y_all[first:stop]
        for group in chunk:
            _linear(group, first, a, family.down, family.down_bias, out=y)
        if family.norm is not None:
            y.copy_(family.norm(y))
    if on_outputs is not None:
        for slots, row in zip(plan.order.split(CALLBACK_ROWS), plan.row.split(CALLBACK_ROWS)):
            on_outputs(slots // k, slots % k, y_all.index_select(0, row))
    return _combine(y_all, plan.place, weights).to(hidden.dtype)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, family, plan, on_outputs, hidden, weights, up, down, up_bias, down_bias, *others):
        kept_u = _empty(len(plan.token), up.shape[2], dtype=family.dtype)
        out = _run_chunks(family, plan, hidden, weights, on_outputs, kept_u)
        ctx.save_for_backward(hidden, weights, kept_u, up, down, up_bias, down_bias, *others)
        ctx.family, ctx.plan = family, plan
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        hidden, weights, kept_u, up, down, up_bias, down_bias, *others = ctx.saved_tensors
        family, plan, dtype, rows = ctx.family, ctx.plan, ctx.family.dtype, len(ctx.plan.token)
        need_hidden, need_weights, need_up, need_down, need_up_bias, need_down_bias, *need_others = (
            ctx.needs_input_grad[3:]
        )
        need_u = need_hidden or need_up or need_up_bias or any(need_others)
        tokens, grads = hidden.to(dtype), grad_out.to(dtype)
        # Gate weights per row. Padding has zero, and so adds nothing to any gradient.
        w_all = torch.zeros(rows, 1, dtype=dtype)
        w_all[plan.row, 0] = weights.reshape(-1)[plan.order].to(dtype)

        d_x = _empty(rows + 1, hidden.shape[1], dtype=dtype) if need_hidden else None
        d_w = torch.zeros(rows + 1, dtype=weights.dtype)
        d_up = _room_for_gradient(up, plan) if need_up else None
        d_down = _room_for_gradient(down, plan) if need_down else None
        d_up_bias = torch.zeros_like(up_bias) if need_up_bias else None
        d_down_bias = torch.zeros_like(down_bias) if need_down_bias else None
        d_others = [torch.zeros_like(p) if need else None for p, need in zip(others, need_others)]

        for chunk in plan.chunks:
            first, stop = chunk[0].start, chunk[-1].stop
            token, w, u = plan.token[first:stop], w_all[first:stop], kept_u[first:stop]
            g = grads.index_select(0, token)
            a, pull_gate = swiglu(u) if family.is_swiglu else with_pullback(family.gate, u, others, d_others)

            if family.norm is not None:
                y = torch.empty_like(g)
                for group in chunk:
                    _linear(group, first, a, down, down_bias, out=y)
                y, pull_norm = with_pullback(family.norm, y, others, d_others)
                d_w[first:stop] = (y * g).sum(-1)
                g, w = pull_norm(g * w), torch.ones_like(w)

            # g is still without the gate weight w, so that g @ down^T also gives the gradient of w.
            d_a = torch.empty_like(a)
            for group in chunk:
                _linear(group, first, g, down.transpose(1, 2), None, out=d_a)
            if family.norm is None:
                d_w[first:stop] = (a * d_a).sum(-1, dtype=d_w.dtype)
                if down_bias is not None:
                    g_bias = torch.empty_like(w)
                    for group in chunk:
                        _linear(group, first, g, down_bias[..., None], None, out=g_bias)
                    d_w[first:stop] += g_bias[:, 0]
            d_a *= w
            if d_down is not None:
                a = a * w
                for group in chunk:
                    _weight_gradient(group, first, a, g, out=d_down)
            if d_down_bias is not None:
                for group in chunk:
                    _weight_gradient(group, first, w, g, out=d_down_bias[:, None])

            if not need_u:
                continue
            d_u = pull_gate(d_a)
            if d_up is not None:
                x = tokens.index_select(0, token)
                for group in chunk:
                    _weight_gradient(group, first, x, d_u, out=d_up)
            if d_up_bias is not None:
                ones = torch.ones_like(w)
                for group in chunk:
                    _weight_gradient(group, first, ones, d_u, out=d_up_bias[:, None])
            if d_x is not None:
                for group in chunk:
                    _linear(group, first, d_u, up.transpose(1, 2), None, out=d_x[first:stop])

        d_hidden = None
        if d_x is not None:
            d_x[rows] = 0
            d_hidden = _combine(d_x, plan.place, None).to(hidden.dtype)
        d_weights = d_w[plan.place] if need_weights else None
        return None, None, None, d_hidden, d_weights, d_up, d_down, d_up_bias, d_down_bias, *d_others


def _linear(group: _Group, first: int, x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    """out = x @ weight[e] + bias[e] for the rows of a group; `x` and `out` begin at row `first` of the buffer."""
    y = group.of(out, first)
    torch.bmm(group.of(x, first), weight[group.experts].to(x.dtype), out=y)
    if bias is not None:
        y += bias[group.experts, None]


def _weight_gradient(group: _Group, first: int, x: Tensor, d_y: Tensor, *, out: Float[Tensor, "e i o"]) -> None:
    """out[e] = x^T @ d_y over the rows of each expert. A bias is the weight of an input that is always one."""
    x, d_y, out = group.of(x, first), group.of(d_y, first), out[group.experts]
    if out.dtype != x.dtype:  # autocast: products in 16 bit, gradients as wide as the parameter
        out.copy_(torch.bmm(x.transpose(1, 2), d_y))
    elif out.is_contiguous():
        torch.bmm(x.transpose(1, 2), d_y, out=out)
    else:  # `out` is the transpose of what is stored
        torch.bmm(d_y.transpose(1, 2), x, out=out.transpose(1, 2))


def _room_for_gradient(weight: Tensor, plan: _Plan) -> Tensor:
    """Only experts without tokens need zeros: the products write all others."""
    grad, end = _on_huge_pages(torch.empty_like(weight)), 0
    for group in (group for chunk in plan.chunks for group in chunk):
        grad[end : group.lo].zero_()
        end = group.hi
    grad[end:].zero_()
    return grad


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return _on_huge_pages(torch.empty(*shape, dtype=dtype))


def _on_huge_pages(fresh: Tensor) -> Tensor:
    """The same tensor, whose memory the kernel may hand out in huge pages (where it leaves the choice to programs)."""
    if _MADVISE is not None and fresh.nbytes >= HUGE_BUFFER_BYTES:
        start = -(-fresh.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        stop = (fresh.data_ptr() + fresh.nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        _MADVISE(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_HUGEPAGE)  # advice: may be refused
    return fresh


_MADVISE = ctypes.CDLL(None).madvise if sys.platform == "linux" else None


def _combine(y: Float[Tensor, "p h"], place: Int[Tensor, "n k"], weights: Float[Tensor, "n k"] | None) -> Tensor:
    """sum over k of weights[n, k] * y[place[n, k]]; y's last row is the zero of the sentinels."""
    if place.numel() == 0:
        return y.new_zeros(len(place), y.shape[1])
    if weights is not None:
        # A sentinel adds nothing, whatever its weight (also NaN).
        weights = weights.masked_fill(place == len(y) - 1, 0).to(y.dtype)
    # Sums in fp32 also for 16-bit types, and never holds [N, K, H].
    return F.embedding_bag(place, y, mode="sum", per_sample_weights=weights)


# --- CPU: a few slots -----------------------------------------------------------------------------------------------


def _forward_slots(
    family: Family, hidden: Tensor, indices: Tensor, weights: Tensor, on_outputs: OnOutputs | None
) -> Tensor:
    """One slot after the other: reads each expert's weights where they are."""
    k, num_experts = indices.shape[1], len(family.up)
    tokens = hidden.to(family.dtype)
    flat = indices.flatten().tolist()
    _check_last(max(flat, default=0), num_experts)
    slots = [(e, s) for s, e in enumerate(flat) if e < num_experts]
    if on_outputs is not None:
        slots.sort()
    out = torch.zeros(hidden.shape, dtype=torch.promote_types(family.dtype, torch.float32))
    outputs = []
    for e, s in slots:
        u = tokens[s // k, None] @ family.up[e].to(family.dtype)
        if family.up_bias is not None:
            u += family.up_bias[e]
        y = family.gate(u) @ family.down[e].to(family.dtype)
        if family.down_bias is not None:
            y += family.down_bias[e]
        if family.norm is not None:
            y = family.norm(y)
        out[s // k].addcmul_(y[0], weights[s // k, s % k])
        outputs.append(y)
    if on_outputs is not None and outputs:
        slot = torch.tensor([s for _, s in slots])
        on_outputs(slot // k, slot % k, torch.cat(outputs))
    return out.to(hidden.dtype)
