"""Contrast a model's predictions with those of its own unchosen experts, while generating.

    with self_contrast(view, beta=0.5) as processor:      a LogitsProcessor of transformers
        view.model.generate(**inputs, logits_processor=[processor])

1. Strong pass: the model as it is, with whatever edits are in force: z_s, the logits of the last position.
2. Weak pass: the same weights and prefix, all MoE layers routed weakly, by default each token to the router's second
   choice alone: z_w. It has a KV cache of its own, which is extended by the same tokens.
3. Tokens that the strong pass finds plausible: V = {i : z_s[i] >= log(alpha) + max_j z_s[j]}.
4. z[i] = (1 + beta) z_s[i] - beta z_w[i] for i in V, else -inf: greedy takes its arg-max, sampling its softmax.

The paper has alpha = 0.1 throughout, and searches beta in {0.1, 0.3, 0.5, 0.7, 0.9}: more is not always better.
`contrastive` takes the weak logits from another, smaller model instead ("Contrastive Decoding", arXiv:2210.15097).
"Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast" (arXiv:2405.14507).
Shapes: B rows, T positions, V vocabulary, W weak routings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import ref

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from moestro.steer.reroute import rank
from moestro.view.edit import Edit
from moestro.view.observe import as_batch

RANK, BETA, ALPHA = 2, 0.5, 0.1  # the paper's defaults


@contextmanager
def self_contrast(
    view: Any, weak: Edit | None = None, *, beta: float = BETA, alpha: float = ALPHA
) -> Iterator[Contrast]:
    """A processor for `view.model.generate` inside the block: greedy or sampled, any batch, the prompt from its start.

    `weak`: the edit that makes the weak pass, `rank(view, 2)` by default. A forward pass inside the block costs two,
    and observers are given both.
    Raises ValueError for beta < 0, alpha outside (0, 1], or an edit that does not fit the model.
    """
    weak = rank(view, RANK) if weak is None else weak
    with view.edits(weak):
        pass  # refused now, not at the first token
    with _beside(view.model, Contrast(view.model, lambda: view.edits(weak), beta, alpha)) as processor:
        yield processor


@contextmanager
def contrastive(model: Any, amateur: Any, *, beta: float = BETA, alpha: float = ALPHA) -> Iterator[Contrast]:
    """The same with the logits of `amateur`, a language model of the same vocabulary, in the place of the weak pass."""
    with _beside(model, Contrast(amateur, nullcontext, beta, alpha)) as processor:
        yield processor


def contrast(
    strong: Float[Tensor, "... v"], weak: Float[Tensor, "... v"], *, beta: float = BETA, alpha: float = ALPHA
) -> Float[Tensor, "... v"]:
    """The contrasted logits z, by the equation above."""
    strong = strong.float()
    plausible = strong >= strong.amax(dim=-1, keepdim=True) + math.log(alpha)
    return torch.where(plausible, (1 + beta) * strong - beta * weak.float(), float("-inf"))


@torch.no_grad()
def routing_divergence(view: Any, batch: Any, weak: Sequence[Edit]) -> Float[Tensor, "w b t"]:
    """KL(p || p_weak) in nats of the next-token distributions at every place, for each weak routing; 0 at padding."""
    known, inputs = as_batch(batch)
    inputs = {name: values.to(view.device) for name, values in inputs.items()}
    strong = view.model(**inputs, use_cache=False).logits
    found = []
    for edit in weak:
        with view.edits(edit):
            logits = view.model(**inputs, use_cache=False).logits
        pairs = zip(strong, logits)  # a row at a time: the vocabulary is large
        found.append(torch.stack([_kl(s.float().log_softmax(-1), w.float().log_softmax(-1)) for s, w in pairs]))
    real = known.on_grid(torch.ones(len(known.tokens), dtype=torch.bool), False)
    return torch.stack(found).masked_fill(~real.to(strong.device), 0.0)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(dim=-1)


@contextmanager
def _beside(model: Any, processor: Contrast) -> Iterator[Contrast]:
    if any(isinstance(getattr(h, "__self__", None), Contrast) for h in model._forward_hooks.values()):
        raise RuntimeError("the model is decoded by contrast already, and two contrasts do not add up; use one")
    hook = model.register_forward_hook(processor.after_forward, with_kwargs=True)
    try:
        yield processor
    finally:
        hook.remove()
        processor.forget()


class Contrast(LogitsProcessor):
    """Repeats every forward pass of a model weakly, with a KV cache of its own, and contrasts the two.

    A pass that fills a new KV cache starts the weak one anew, so every call of `generate` does.
    """

    def __init__(self, weak: Any, within: Callable[[], AbstractContextManager[Any]], beta: float, alpha: float):
        if not beta >= 0:
            raise ValueError(f"beta={beta}: the weak pass is subtracted beta times; beta is 0 or more")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha={alpha} is no share of the largest probability; it is above 0 and at most 1")
        self.weak, self.within, self.beta, self.alpha = weak, within, beta, alpha
        self._running = False
        self.forget()

    def forget(self) -> None:
        """Drop the weak pass's KV cache and logits."""
        self._strong_cache: ref[Any] | None = None
        self._cache: Any = None
        self._seen = 0
        self._logits: Tensor | None = None
        self._ids: Tensor | None = None

    @torch.no_grad()
    def after_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """The hook on the strong model: the weak pass over the same tokens."""
        if self._running:
            return
        if getattr(out, "logits", None) is None:
            raise ValueError(f"{type(model).__name__} gives no logits: self-contrast needs a language model's head")
        self._follow(kwargs, args, getattr(out, "past_key_values", None))
        self._running = True
        try:
            with self.within():
                weak = self.weak(*args, **{**kwargs, "past_key_values": self._cache})
        finally:
            self._running = False
        if weak.logits.shape != out.logits.shape:
            raise ValueError(f"weak logits of shape {tuple(weak.logits.shape)} beside {tuple(out.logits.shape)}")
        self._cache = getattr(weak, "past_key_values", None)
        self._logits = weak.logits[:, -1]

    def _follow(self, kwargs: dict[str, Any], args: tuple[Any, ...], cache: Any) -> None:
        """Keep the weak KV cache as far as the strong one: start anew with a new one, refuse one that has more."""
        if self._strong_cache is None or cache is None or self._strong_cache() is not cache:
            self.forget()
        if cache is None:
            return
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                f"self-contrast cannot repeat a pass over a {type(cache).__name__}, whose attention masks have a fixed "
                "size; leave out cache_implementation"
            )
        length = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None).shape[
            1
        ]
        before = int(cache.get_seq_length()) - length
        if before != self._seen:
            raise ValueError(
                f"the model's KV cache held {before} tokens before this pass and the weak pass has {self._seen} of "
                "them; give generate the whole prompt, without past_key_values, or a cache filled inside this block"
            )
        self._strong_cache, self._seen = ref(cache), before + length

    def __call__(self, input_ids: Int[Tensor, "b t"], scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        """Raises RuntimeError where the scores are not those of the last forward pass, token by token, row by row."""
        if self._logits is None:
            raise RuntimeError(
                "self-contrast found no forward pass for these scores: use the processor inside its `with` block, on "
                "its model, with greedy decoding or sampling; assisted decoding scores several tokens of one pass"
            )
        weak, self._logits = self._logits, None
        if self._ids is None:
            beams = bool((scores.logsumexp(dim=-1).abs() < 1e-4).all())  # log-probabilities, not logits
        else:
            beams = not torch.equal(input_ids[:, : self._ids.shape[1]], self._ids)
        if beams:
            raise RuntimeError(
                "self-contrast does not work with beam search: contrasted scores are no log-probabilities that could "
                "be added up, and the weak pass's KV cache does not follow beams; use num_beams=1"
            )
        self._ids = input_ids
        return contrast(scores, weak, beta=self.beta, alpha=self.alpha)
