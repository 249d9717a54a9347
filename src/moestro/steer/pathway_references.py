"""References of pathways: prompts that a model answers rightly, and which of them are a question's neighbours.

    references = collect(view, prompts, answers)
    near = nearest(references, questions)

    K(x_i, x) = exp(-|E(x_i) - E(x)|^2 / 2 b^2)     over the k nearest references, in sum 1

E is an embedding, centred on the references' mean and of length 1: hidden states all point much the same way, and their
raw cosines are near 1. b is a bandwidth. "C3PO: Critical-Layer, Core-Expert, Collaborative Pathway Optimization for
Test-Time Expert Re-Mixing" (arXiv:2504.07964). Shapes: S prompts, M references, K neighbours, E experts, d embedding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moestro.steer.answers import BATCH, Prompt, by_length, judge, padded, pairs, token_ids
from moestro.steer.pathway_edit import read
from moestro.steer.steering import Fingerprint

NEIGHBOURS = 3
RADIUS = 0.5
LEAK = 0.95
"""References more similar than this to a question are left out: they may be the question itself."""
Embed = Callable[[Sequence[Any]], Any]
"""Prompts to vectors [S, d]: `SentenceTransformer.encode`, say, for prompts that are texts."""

# of the distance between unit vectors, in bandwidths, and of their similarity
KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gaussian": lambda distance, cosine: torch.exp(-distance.square() / 2),
    "matern": lambda distance, cosine: (1 + math.sqrt(3) * distance) * torch.exp(-math.sqrt(3) * distance),
    "linear": lambda distance, cosine: cosine.clamp_min(0),
    "polynomial": lambda distance, cosine: ((1 + cosine) / 2).square(),
}
Kernel = Literal["gaussian", "matern", "linear", "polynomial"]


@dataclass(eq=False)
class References:
    """Prompts that a model answers rightly, their pathways, and where they lie among each other."""

    prompts: list[list[int]]
    answers: list[list[int]]
    omega: dict[int, Float[Tensor, "m _"]]
    """{layer: pathways}, of all layers that can be given one."""
    embeddings: Float[Tensor, "m d"]
    fingerprint: Fingerprint
    asked: int
    """How many prompts were tried."""
    embed: Embed = field(repr=False)

    def __len__(self) -> int:
        return len(self.prompts)

    def check(self, view: Any) -> None:
        """Raise ValueError where the view's model is not the one whose pathways these are."""
        if (difference := self.fingerprint.difference(Fingerprint.of(view))) is not None:
            raise ValueError(f"these references do not fit the model: {difference}; collect them anew on this model")

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; the embedder stays behind."""
        tensors = {f"omega.{layer}": omega.contiguous() for layer, omega in self.omega.items()}
        tensors["embeddings"] = self.embeddings.contiguous()
        written = {"prompts": self.prompts, "answers": self.answers, "asked": self.asked}
        about = {"fingerprint": self.fingerprint.model_dump_json(), "texts": json.dumps(written)}
        save_file(tensors, path, metadata=about)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, embed: Embed) -> References:
        """`embed`: the embedder that they were collected with. Raises ValueError for another kind of file."""
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if not {"fingerprint", "texts"} <= about.keys():
                raise ValueError(f"{path} holds no references of pathways")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        omega = {int(n.partition(".")[2]): t for n, t in tensors.items() if n.startswith("omega.")}
        print_ = Fingerprint.model_validate_json(about["fingerprint"])
        written = json.loads(about["texts"])
        return cls(
            omega=dict(sorted(omega.items())),
            embeddings=tensors["embeddings"],
            fingerprint=print_,
            embed=embed,
            **written,
        )


@dataclass(frozen=True)
class Neighbours:
    """Of every question, its references and their weights, which sum to 1; an unused place has weight 0."""

    indices: Int[Tensor, "s k"]
    weights: Float[Tensor, "s k"]

    def __getitem__(self, rows: slice) -> Neighbours:
        return Neighbours(self.indices[rows], self.weights[rows])


def hidden_means(view: Any, *, batch_size: int = BATCH) -> Embed:
    """The default embedder: the mean over a prompt's tokens of the model's own final hidden states."""

    @torch.no_grad()
    def embed(prompts: Sequence[Any]) -> Float[Tensor, "s d"]:
        ids = token_ids(view, prompts)
        means: list[Tensor] = [torch.empty(0)] * len(ids)
        for rows in by_length(ids, batch_size):
            batch, mask = (t.to(view.device) for t in padded([ids[r] for r in rows], "right"))
            hidden = view.stack(input_ids=batch, attention_mask=mask, use_cache=False).last_hidden_state.float()
            summed = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            for row, mean in zip(rows, summed.cpu(), strict=True):
                means[row] = mean
        return torch.stack(means)

    return embed


def collect(
    view: Any,
    prompts: Sequence[Prompt],
    answers: Sequence[Prompt],
    *,
    embed: Embed | None = None,
    batch_size: int = BATCH,
    progress: bool = True,
) -> References:
    """The prompts whose answer greedy decoding gives, token by token. End answers as the model ends them ("\\n", say).

    Raises ValueError where prompts and answers differ in number, or the model gets none right.
    """
    asked, known = pairs(view, prompts, answers)
    embed = hidden_means(view, batch_size=batch_size) if embed is None else embed
    right = judge(view, asked, known, batch_size=batch_size, progress=progress).right.nonzero().flatten().tolist()
    if not right:
        raise ValueError(
            f"the model answers none of the {len(asked)} prompts rightly: there is no pathway to learn from"
        )
    kept = [asked[i] for i in right]
    return References(
        kept,
        [known[i] for i in right],
        read(view, kept, batch_size=batch_size, progress=progress),
        _vectors(embed, [prompts[i] for i in right]),
        Fingerprint.of(view),
        len(asked),
        embed,
    )


def nearest(
    references: References,
    prompts: Sequence[Any],
    *,
    k: int = NEIGHBOURS,
    kernel: Kernel = "gaussian",
    bandwidth: float | None = None,
    max_similarity: float = LEAK,
) -> Neighbours:
    """The k references nearest to each prompt, by the angle between embeddings centred on the references' mean.

    `bandwidth`: distance at which the kernel falls off; by default the median distance of a reference to its own k
    nearest. Raises ValueError where the leak guard leaves a prompt fewer than k, or the kernel weighs all with 0.
    """
    if k < 1:
        raise ValueError(f"k={k} neighbours; at least one is needed")
    cosine = _cosines(references, prompts)
    allowed = cosine <= max_similarity
    fewest = int(allowed.sum(dim=1).min())
    if fewest < k:
        raise ValueError(
            f"k={k} neighbours, and prompt {int(allowed.sum(dim=1).argmin())} has {fewest} of {len(references)} "
            f"references that are no more similar than max_similarity={max_similarity}; collect more, or raise it"
        )
    near, indices = cosine.masked_fill(~allowed, -2.0).topk(k, dim=1)
    return Neighbours(indices, _weights(references, near, k, kernel, bandwidth))


def within(
    references: References,
    prompts: Sequence[Any],
    *,
    radius: float = RADIUS,
    kernel: Kernel = "gaussian",
    bandwidth: float | None = None,
    max_similarity: float = LEAK,
) -> Neighbours:
    """All references within a distance of each prompt, between unit vectors (0 to 2).

    Raises ValueError where a prompt has none.
    """
    cosine = _cosines(references, prompts)
    inside = (_distance(cosine) <= radius) & (cosine <= max_similarity)
    if not bool(inside.any(dim=1).all()):
        raise ValueError(
            f"prompt {int(inside.any(dim=1).int().argmin())} has no reference within radius={radius} (and no more "
            f"similar than {max_similarity}): its neighbourhood is empty; widen the radius, or use nearest()"
        )
    near, indices = cosine.masked_fill(~inside, -2.0).topk(int(inside.sum(dim=1).max()), dim=1)
    used = inside.gather(1, indices)
    return Neighbours(indices, _weights(references, near, NEIGHBOURS, kernel, bandwidth, used))


def random_neighbours(references: References, count: int, *, k: int = NEIGHBOURS, seed: int) -> Neighbours:
    """The control: k references drawn for each of `count` prompts, weighed alike."""
    if not 1 <= k <= len(references):
        raise ValueError(f"k={k} random neighbours of {len(references)} references")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(len(references), generator=generator)[:k] for _ in range(count)])
    return Neighbours(drawn, torch.full((count, k), 1 / k))


def _cosines(references: References, prompts: Sequence[Any]) -> Float[Tensor, "s m"]:
    vectors = _vectors(references.embed, prompts)
    if vectors.shape[1] != references.embeddings.shape[1]:
        raise ValueError(
            f"embeddings of width {vectors.shape[1]}, and the references have {references.embeddings.shape[1]}: use "
            "the embedder that they were collected with"
        )
    centre = references.embeddings.mean(dim=0)  # hidden states all point much the same way: raw cosines are near 1
    return _unit(vectors - centre) @ _unit(references.embeddings - centre).T


def _weights(
    references: References, cosine: Tensor, k: int, kernel: Kernel, bandwidth: float | None, used: Tensor | None = None
) -> Float[Tensor, "s k"]:
    if kernel not in KERNELS:
        raise ValueError(f"no kernel {kernel!r}; there are {sorted(KERNELS)}")
    if bandwidth is None:
        unit = _unit(references.embeddings - references.embeddings.mean(dim=0))
        bandwidth = median_distance(_distance(unit @ unit.T), k)
    elif not bandwidth > 0:
        raise ValueError(f"bandwidth={bandwidth}: it is a distance above 0")
    weights = KERNELS[kernel](_distance(cosine) / bandwidth, cosine)
    if used is not None:
        weights = weights * used
    total = weights.sum(dim=1, keepdim=True)
    if not bool((total > 0).all()):
        raise ValueError(
            f"kernel {kernel!r} with bandwidth {bandwidth:.3g} gives every neighbour of prompt "
            f"{int((total <= 0).int().argmax())} the weight 0; raise the bandwidth, or use another kernel"
        )
    return weights / total


def median_distance(distance: Float[Tensor, "m m"], k: int) -> float:
    """Median distance of each to its k nearest others; 1 where there are no others."""
    if len(distance) < 2:
        return 1.0
    others = distance + torch.diag(torch.full((len(distance),), math.inf))
    return max(float(others.topk(min(k, len(distance) - 1), dim=1, largest=False).values.median()), 1e-6)


def _distance(cosine: Tensor) -> Tensor:
    return (2 - 2 * cosine).clamp_min(0).sqrt()


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _vectors(embed: Embed, prompts: Sequence[Any]) -> Float[Tensor, "s d"]:
    vectors = torch.as_tensor(embed(prompts)).detach().float().cpu()
    if vectors.dim() != 2 or len(vectors) != len(prompts) or not bool(vectors.isfinite().all()):
        raise ValueError(
            f"the embedder gave {tuple(vectors.shape)} for {len(prompts)} prompts; finite [S, d] is needed"
        )
    return vectors
