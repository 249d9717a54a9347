"""A training run on disk: everything that decides how it goes on, written at once or not at all."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILE = "checkpoint.pt"
KEYS = {"step", "seconds", "settings", "weights", "buffers", "optimiser", "random"}


def write(folder: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint beside the old one, then take its place."""
    draft = folder / f"{FILE}.part"
    try:
        torch.save(state, draft)
        os.replace(draft, folder / FILE)
    finally:
        draft.unlink(missing_ok=True)


def read(folder: Path) -> dict[str, Any] | None:
    """The checkpoint in `folder`; None without one. Raises ValueError for a file of that name of other making."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no checkpoint of a moestro run; choose another directory") from error
    if not isinstance(state, dict) or not state.keys() >= KEYS:
        raise ValueError(f"{path} is no checkpoint of a moestro run; choose another directory")
    return state


def random_state() -> dict[str, Tensor]:
    """Of torch, on CPU and on the current GPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Every buffer, those that are not part of a state dict too: routers count in them."""
    return {name: b.detach().cpu() for name, b in model.named_buffers()}


@torch.no_grad()
def set_buffers(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.copy_(saved[name])


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: value in the checkpoint, value now` of everything that is not the same, nested keys with dots."""
    found = []
    for key in sorted({*saved, *now}, key=str):
        a, b, name = saved.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {a} in the checkpoint, {b} now")
    return found


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError that lists what differs between the run in `folder` and the one that would resume it."""
    changed = differences(saved, now)
    if changed:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}); give these back, "
            "or start anew in another directory"
        )
