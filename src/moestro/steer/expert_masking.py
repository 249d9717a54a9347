"""Whose experts are they? Routing mass of Monet's experts by domain, and removing a domain's experts at inference.

    mass[d]_ij = mean over the domain's tokens of sum over heads of g1[i] g2[j]
    expert (i, j) of a group belongs to d where mass[d] >= ratio * the second largest domain's mass

With a score for each text (toxicity, say) in the place of domains: the correlation of an expert's mass with it.

Monet: Mixture of Monosemantic Experts for Transformers (arXiv:2412.04139).
Shapes: G groups (routers), S parts of a side, D domains, N tokens, R routing heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moestro.models.monet import MonetRouter, Parts, routers
from moestro.view.events import Batch
from moestro.view.observe import as_batch

RATIO = 2.0


def expert_mass(model: nn.Module, data: Mapping[str, Iterable[Any]]) -> Float[Tensor, "g s s d"]:
    """Mean routing mass of every expert by domain; a domain's sums over all experts are R.

    `data`: {domain: batches}, a batch being token ids [B, T], a mapping with `attention_mask`, or a token batch.
    Raises ValueError for a domain without tokens.
    """
    by_domain = []
    for domain, batches in data.items():
        tokens, total = 0, torch.zeros(())
        for left, right, _ in _gates(model, batches):
            total = total + torch.einsum("gnri,gnrj->gij", left, right).double()
            tokens += left.shape[1]
        if not tokens:
            raise ValueError(f"domain {domain!r} holds no token; its experts cannot be told")
        by_domain.append(total / tokens)
    return torch.stack(by_domain, dim=-1)


def assign_experts(mass: Float[Tensor, "... d"], *, ratio: float = RATIO) -> Bool[Tensor, "d ..."]:
    """Which experts belong to each domain, by the rule above; those of any model with such a mass.

    Raises ValueError for fewer than two domains, or a ratio below 1, with which two domains could own an expert.
    """
    if ratio < 1:
        raise ValueError(f"ratio={ratio}: an expert would belong to several domains; it is 1 or more")
    if mass.shape[-1] < 2:
        raise ValueError("one domain alone has every expert; give the mass of two or more")
    best, second = mass.topk(2, dim=-1).values.unbind(dim=-1)
    owned = (best >= ratio * second) & (best > 0)
    top = mass.argmax(dim=-1)
    return torch.stack([owned & (top == d) for d in range(mass.shape[-1])])


def score_correlation(model: nn.Module, data: Iterable[Any], scores: Float[Tensor, " b"]) -> Float[Tensor, "g s s"]:
    """Correlation over texts of an expert's mean mass with the text's score; 0 for an expert without variation.

    `data`: batches whose rows are texts, in the order of `scores`. Raises ValueError where their numbers differ.
    """
    rows = []
    for left, right, batch in _gates(model, data):
        for row in range(batch.shape[0]):
            place = torch.arange(batch.shape[0]).repeat_interleave(batch.shape[1])
            own = (place if batch.kept is None else place[batch.kept]) == row
            mass = torch.einsum("gnri,gnrj->gij", left[:, own], right[:, own]) / max(int(own.sum()), 1)
            rows.append(mass)
    if len(rows) != len(scores):
        raise ValueError(f"{len(scores)} scores for {len(rows)} texts; give one for each")
    mass = torch.stack(rows).double()
    mass, scores = mass - mass.mean(dim=0), scores.double() - scores.double().mean()
    spread = mass.square().sum(dim=0).sqrt() * scores.norm()
    return torch.einsum("bgij,b->gij", mass, scores) / spread.clamp_min(1e-12)


@contextmanager
def mask_experts(model: nn.Module, removed: Bool[Tensor, "g s s"]) -> Iterator[None]:
    """Run without the experts that `removed` marks. Masks nest; each is gone after its block, also after an exception.

    A token costs S^2 products then, for a pair cannot be taken out of the two factors.
    """
    found = routers(model)
    expected = (len(found), found[0].parts, found[0].parts)
    if removed.shape != expected or removed.dtype != torch.bool:
        raise ValueError(f"a mask of shape {tuple(removed.shape)}, {removed.dtype}; the model's is {expected}, bool")

    def remove(mask: Tensor, _: nn.Module, args: Any, out: Parts) -> Parts:
        before = False if out.removed is None else out.removed
        return out._replace(removed=mask.to(out.left.device) | before)

    hooks = [router.register_forward_hook(partial(remove, mask)) for router, mask in zip(found, removed, strict=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _gates(model: Any, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor, Batch]]:
    """(left, right [G, N, R, S], the batch) of every batch, padding removed."""
    found = routers(model)
    seen: dict[MonetRouter, Parts] = {}
    keep: Callable[..., None] = lambda router, args, out: seen.__setitem__(router, out)  # noqa: E731
    training = model.training
    hooks = [router.register_forward_hook(keep) for router in found]
    try:
        model.eval()
        for item in batches:
            batch, inputs = as_batch(item)
            with torch.no_grad():
                model.base_model(**{k: v.to(model.device) for k, v in inputs.items()}, use_cache=False)
            kept = slice(None) if batch.kept is None else batch.kept.to(model.device)
            yield (
                torch.stack([seen[router].left[kept] for router in found]),
                torch.stack([seen[router].right[kept] for router in found]),
                batch,
            )
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
