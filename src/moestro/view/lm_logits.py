"""The language model around the experts, for observers of what it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from moestro.view.events import Batch, LogitsObserver
from moestro.view.heads import AnyObserver


def logits_observers(observers: Sequence[AnyObserver]) -> list[LogitsObserver]:
    """Those that need "lm_logits"."""
    return [cast(LogitsObserver, o) for o in observers if "lm_logits" in o.needs]


def hand_logits(observers: Sequence[LogitsObserver], batch: Batch, ids: Tensor, logits: Tensor) -> None:
    """Raises ValueError where there is not one row of logits for each token."""
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(f"logits of shape {tuple(logits.shape)} for ids of shape {tuple(ids.shape)}; need [B, T, V]")
    for observer in observers:
        observer.update_logits(batch, ids, logits.detach())


def language_model(model: nn.Module, stack: nn.Module) -> Any:
    """The innermost model around `stack` that has a language head. Raises ValueError where none has."""
    name = next(n for n, m in model.named_modules() if m is stack)
    parts = name.split(".") if name else []
    for end in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise ValueError(
        f"{type(model).__name__} has no language head, so it gives no logits (the held-out loss, say, is made of "
        "them); open the causal language model around it"
    )
