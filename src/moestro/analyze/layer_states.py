"""What a model holds of a text at every depth: vectors at its last token, one a text and layer.

`layer_states` reads any transformers language model with hooks that keep the last token's vector and nothing else, so
memory does not grow with the length of the texts (`output_hidden_states` keeps all tokens of all layers of a batch, and
gives the last layer's states after the final norm). `LastTokens` is an observer for what belongs to the experts.
Shapes: S texts, H hidden, E experts, B rows, T positions, N tokens, M texts of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.analyze.local_routing import stretches
from moestro.data import Document, token_batches
from moestro.routing import SCORES, RoutingRule
from moestro.view.events import MoEEvent
from moestro.view.observe import progress_bar
from moestro.view.open import ExpertView

States = Mapping[int, Float[Tensor, "s h"]]
"""{decoder layer: one vector for each text, in their order}"""
SITES = ("residual", "mlp_input")
OBSERVED_SITES = ("mlp_input", "router", "routed")


def layer_states(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    site: str = "residual",
    batch_size: int = 32,
    progress: bool = True,
) -> dict[int, Float[Tensor, "s h"]]:
    """{decoder layer: float32 vectors of the texts' last tokens}, of a language model or an open view, edits included.

    `site`: "residual", the output of the decoder layer, or "mlp_input", what its feed-forward part reads (after the
    norm).

    Raises ValueError before anything runs for blank texts, a text longer than the model's context, or a model whose
    decoder layers are not found; afterwards where they do not give [B, T, H] or have no such site.
    """
    if site not in SITES:
        raise ValueError(f"site={site!r}; it is {' or '.join(SITES)} (LastTokens reads a router's probabilities)")
    if blank := [i for i, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"text {blank[0]} is blank: it has no last token")
    if getattr(model, "streamed", False):
        raise ValueError("the weights stay on disk: open the model without stream=True, or observe LastTokens")
    stack = model.stack if isinstance(model, ExpertView) else model.get_decoder()
    blocks = decoder_layers(stack)
    context = getattr(stack.config.get_text_config(), "max_position_embeddings", None) or 2**31
    documents = [Document(text=text) for text in texts]
    batches = token_batches(documents, tokenizer, max_length=context, batch_size=batch_size, overflow="refuse")
    device = next(stack.parameters()).device
    found: dict[int, list[Tensor]] = {i: [] for i in range(len(blocks))}
    order = []
    with torch.no_grad(), progress_bar(progress) as bar:
        task = bar.add_task("hidden states", total=len(batches))
        for batch in batches:
            with _last_tokens(blocks, site, batch.attention_mask) as kept:
                ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
                stack(input_ids=ids, attention_mask=mask, use_cache=False)
            for i, vectors in enumerate(kept):
                if len(vectors) != 1:
                    raise ValueError(
                        f"decoder layer {i} ran {len(vectors)} times in one pass with site={site!r}: its state is not "
                        "one vector a token" + (" ; use site='residual'" if site != "residual" else "")
                    )
                found[i].append(vectors[0])
            order.append(batch.sample)
            bar.advance(task)
    back = torch.cat(order).argsort()
    return {i: torch.cat(parts)[back] for i, parts in found.items()}


def decoder_layers(stack: nn.Module) -> list[nn.Module]:
    """The decoder layers: as many modules in a list as the config counts. Raises ValueError where there is no such."""
    count = stack.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
    lists: list[nn.ModuleList] = [m for m in stack.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(
            f"{type(stack).__name__} keeps no list of its {count} decoder layers: their states are not found"
        )
    sizes = [sum(p.numel() for p in m.parameters()) for m in lists]
    return [*lists[sizes.index(max(sizes))]]


@contextmanager
def _last_tokens(blocks: Sequence[nn.Module], site: str, mask: Int[Tensor, "b t"]) -> Iterator[list[list[Tensor]]]:
    """For each decoder layer, the last tokens' vectors [B, H] of each time that it runs inside the block."""
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
    kept: list[list[Tensor]] = [[] for _ in blocks]

    def keep(number: int, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[:2] != mask.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"decoder layer {number} hands on {shape}, which is not [B, T, H] = {(*mask.shape, '...')}"
            )
        rows = torch.arange(len(last), device=value.device)
        kept[number].append(value[rows, last.to(value.device)].float().cpu())

    with ExitStack() as undo:
        for number, block in enumerate(blocks):
            if site == "residual":
                hook = block.register_forward_hook(lambda _, args, out, number=number: keep(number, out))
            else:
                take = partial(_input, number, keep)
                hook = _feed_forward(block, number).register_forward_pre_hook(take, with_kwargs=True)
            undo.callback(hook.remove)
        yield kept


def _input(number: int, keep: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    keep(number, args[0] if args else next(iter(kwargs.values())))


def _feed_forward(block: nn.Module, number: int) -> nn.Module:
    """The part of a decoder layer that is no mixer of tokens: the second of its two parts with matrices."""
    parts = [(n, m) for n, m in block.named_children() if any(p.dim() > 1 for p in m.parameters())]
    mixers = ("attn", "attention", "mixer", "mamba", "conv")
    others = [m for n, m in parts if not any(word in n for word in mixers)]
    if len(parts) != 2 or len(others) != 1:
        raise ValueError(
            f"decoder layer {number} has the parts {[n for n, _ in parts]}: which of them is its feed-forward part "
            "cannot be told; use site='residual'"
        )
    return others[0]


class LastTokens:
    """Observer: {layer: vectors [S, H or E] at the last token of each text}, in the order of the samples.

    `site`: "mlp_input", what the experts read; "router", the router's probabilities; "routed", the routed experts'
    weighted sum. Texts may be cut over batches and processes. `rules`: as in TextProfiles.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, site: str = "router", rules: Mapping[int, RoutingRule | None] | None = None):
        if site not in OBSERVED_SITES:
            raise ValueError(f"site={site!r}; it is one of {', '.join(OBSERVED_SITES)}")
        self.site, self.rules = site, rules or {}
        self._kept: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def update(self, event: MoEEvent) -> None:
        last = (stretches(event.tokens)[1] == 1).nonzero().flatten()
        if self.site == "router":
            rule = self.rules.get(event.layer)
            logits = event.routing.logits[last.to(event.routing.logits.device), : event.num_experts].float()
            scores = SCORES["softmax" if rule is None else rule.score](logits)
            value = scores / scores.sum(dim=1, keepdim=True).clamp_min(1e-20)
        else:
            value = event.hidden if self.site == "mlp_input" else event.combined
            value = value[last.to(value.device)].float()
        tokens = event.tokens[last]
        self._kept.setdefault(event.layer, []).append((tokens.sample, tokens.position, value.cpu()))

    def merge(self, other: Self) -> None:
        for layer, parts in other._kept.items():
            self._kept.setdefault(layer, []).extend(parts)

    def result(self) -> dict[int, Float[Tensor, "s h"]]:
        found = {}
        for layer, parts in sorted(self._kept.items()):
            sample, position, value = (torch.cat(column) for column in zip(*parts, strict=True))
            rows = _last_of_each(sample, position)
            found[layer] = value[rows]
        return found


class LastTokenOutputs:
    """Observer: {(layer, expert): (texts [M], outputs [M, H])} of the experts that serve the texts' last tokens.

    Outputs are before the gate weight. The number of texts times K vectors a layer are kept.
    """

    needs = frozenset({"outputs"})

    def __init__(self) -> None:
        self._kept: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}

    def update(self, event: MoEEvent) -> None:
        last = (stretches(event.tokens)[1] == 1).nonzero().flatten()
        rows, tokens = last.to(event.outputs.device), event.tokens[last]
        unused = (event.routing.weights[rows] == 0) | (event.routing.indices[rows] >= event.num_experts)
        experts = event.routing.indices[rows].masked_fill(unused, -1).cpu()
        kept = (tokens.sample, tokens.position, experts, event.outputs[rows].float().cpu())
        self._kept.setdefault(event.layer, []).append(kept)

    def merge(self, other: Self) -> None:
        for layer, parts in other._kept.items():
            self._kept.setdefault(layer, []).extend(parts)

    def result(self) -> dict[tuple[int, int], tuple[Int[Tensor, " m"], Float[Tensor, "m h"]]]:
        found = {}
        for layer, parts in sorted(self._kept.items()):
            sample, position, experts, outputs = (torch.cat(column) for column in zip(*parts, strict=True))
            rows = _last_of_each(sample, position)
            experts, outputs = experts[rows], outputs[rows]
            for e in experts[experts >= 0].unique().tolist():
                texts, slots = (experts == e).nonzero(as_tuple=True)
                found[layer, e] = (texts, outputs[texts, slots])
        return found


def _last_of_each(sample: Int[Tensor, " n"], position: Int[Tensor, " n"]) -> Int[Tensor, " s"]:
    """Where the largest position of each sample stands, in the order of the samples."""
    order = position.argsort(stable=True)
    order = order[sample[order].argsort(stable=True)]
    return order[torch.cat([sample[order].diff() != 0, torch.ones(1, dtype=torch.bool)])]
