"""What the entries are trained on: the embedded sample, and two generated tasks whose domains follow different rules.

Routing matters in the generated tasks because their domains share nothing (see `moestro.data.rules`): experts that
serve one rule each are not disturbed by the others, and the layers are too narrow to learn all the rules as quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from moestro.data.rules import RuleRows, chains, ciphers
from moestro.evidence.training import Packed, packed


@dataclass(frozen=True)
class Task:
    """Rows to train on, rows to measure on, and which of their tokens the loss counts."""

    data: Packed
    heldout: Packed
    scored: Bool[Tensor, "r t"]
    """Of the held-out rows: True at tokens whose prediction counts; never the first of a row."""
    config: dict[str, Any] = field(default_factory=dict)
    """What the model's config takes from the task: the vocabulary."""

    def first(self, rows: int) -> Task:
        """The same, with at most `rows` held-out rows of each domain."""
        domain = self.heldout.domain
        taken = torch.cat([(domain == d).nonzero()[:rows, 0] for d in range(len(self.heldout.domains))])
        part = Packed(self.heldout.ids[taken], domain[taken], self.heldout.domains)
        return replace(self, heldout=part, scored=self.scored[taken])


@cache
def sample_task() -> Task:
    """The embedded sample: code, science, instructions, texts of nine languages, arithmetic, sorting, ..."""
    heldout = packed("heldout")
    scored = torch.ones_like(heldout.ids, dtype=torch.bool)
    scored[:, 0] = False
    return Task(packed("calibration"), heldout, scored)


@cache
def chains_task() -> Task:
    """Every token is continued as its row's domain says: 16 permutations of 256 tokens."""
    return _generated(chains)


@cache
def ciphers_task() -> Task:
    """Words of 3 letters are enciphered as their row's domain says: 16 permutations of 64 letters."""
    return _generated(ciphers, rows=65_536)


def _generated(generate: Callable[[int, int], RuleRows], rows: int = 8192, heldout: int = 256) -> Task:
    train, test = generate(0, rows), generate(1, heldout)
    return Task(_packed(train), _packed(test), torch.from_numpy(test.scored), {"vocab_size": train.vocab})


def _packed(rows: RuleRows) -> Packed:
    names = tuple(f"rule {d}" for d in range(int(rows.domain.max()) + 1))
    return Packed(torch.from_numpy(rows.ids), torch.from_numpy(rows.domain), names)


TASKS: dict[str, Callable[[], Task]] = {"sample": sample_task, "chains": chains_task, "ciphers": ciphers_task}
"""{name: function that makes it}."""
