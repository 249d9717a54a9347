"""Tell whether two observations are one and the same: digests of data, of weights, and of what observers ask for."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moestro.view.observe import as_batch

SAMPLE = 64
"""Values of a tensor that go into the digest of weights by themselves."""


def digest_of_data(batches: Any) -> str:
    """Of all token ids with their samples, positions and domains. `batches`: a sequence of token batches."""
    digest, samples = hashlib.sha256(), 0
    for number in range(len(batches)):
        batch, inputs = as_batch(batches[number], samples)
        samples += batch.shape[0]
        tokens = batch.tokens
        for tensor in (inputs["input_ids"], tokens.id, tokens.sample, tokens.position, tokens.domain):
            _add(digest, tensor)
        digest.update(repr(tokens.domains).encode())
    return digest.hexdigest()


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
    digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())


def digest_of_weights(model: nn.Module) -> str:
    """Of every tensor's name, shape and type, the sum of the bits in each of its rows, and some values; of weights
    that are loaded. One expert that differs shows."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), SAMPLE), dtype=torch.float64).long()
        digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        _add(digest, flat[places.to(flat.device)])
        if tensor.dim() and len(tensor):
            bits = tensor.detach().contiguous().view(torch.uint8)
            words = bits.view(torch.int64) if bits.shape[-1] % 8 == 0 else bits
            _add(digest, words.sum(-1, dtype=torch.int64))  # memory's own speed: no byte is hashed
    return digest.hexdigest()


def digest_of_files(files: Sequence[Path]) -> str:
    """Of the files' names and whole contents: reading them takes a fraction of what a calibration takes."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


def observer_key(observer: Any) -> str:
    """By what an observer that goes on from disk is known: its class, and its `key()`, which names its parameters.

    Without a `key()`, a digest of all that it holds before it has seen anything stands for them: what depends on the
    process (a temporary directory's name) then makes it another observer, which costs a pass and never a wrong result.

    Raises ValueError where there is neither a key nor a state that can be described.
    """
    name = f"{type(observer).__module__}.{type(observer).__qualname__}"
    if hasattr(observer, "key"):
        return f"{name} {observer.key()!r}"
    digest = hashlib.sha256()
    try:
        _describe(digest, vars(observer), ())
    except Exception as e:  # whatever pickle says of a part is the reason
        raise ValueError(
            f"work= must know {name} again, and its state cannot be described ({e}); give it a key() that names its "
            "parameters"
        ) from e
    return f"{name} {digest.hexdigest()}"


def _describe(digest: Any, value: Any, around: tuple[int, ...]) -> None:
    """Add the value to the digest, the same in every process: sets in order, objects by their class and attributes."""
    digest.update(f"<{type(value).__module__}.{type(value).__qualname__}".encode())
    if id(value) in around:
        digest.update(f"again {around.index(id(value))}".encode())
        return
    inner = (*around, id(value))
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | Path):
        digest.update(repr(value).encode())
    elif isinstance(value, Tensor):
        _add(digest, value)
    elif isinstance(value, Mapping):
        for key, held in value.items():
            _describe(digest, key, inner)
            _describe(digest, held, inner)
    elif isinstance(value, Set):
        for held in sorted(value, key=repr):
            _describe(digest, held, inner)
    elif isinstance(value, list | tuple):
        for held in value:
            _describe(digest, held, inner)
    elif hasattr(value, "__dict__") and not callable(value):
        _describe(digest, vars(value), inner)
    else:  # functions by their name, arrays and the like by their content
        digest.update(pickle.dumps(value, protocol=4))
    digest.update(b">")
