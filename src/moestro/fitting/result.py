"""What a fit found, as it is written to report.json and drawn in report.html."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel


class DomainLoss(BaseModel):
    """Held-out loss of one domain, in nats per token."""

    domain: str
    task: bool
    """Whether the model was fitted for this domain."""
    tokens: int
    before: float
    after: float


class LayerChoice(BaseModel):
    """What was kept in one MoE layer. Experts are numbered as in the original model."""

    layer: int
    num_experts: int
    top_k: int
    kept: list[int]
    scores: list[float | None]
    """[E] saliency; None: no calibration token reached the expert, so nothing is known about it."""
    tokens: list[list[int]]
    """[D, E] calibration tokens that each expert served, by domain (see FitReport.calibration)."""
    heldout_tokens: list[list[int]]
    """[D, E] held-out tokens that each expert of the whole model served, by domain (see FitReport.losses)."""


class Sample(BaseModel):
    """One held-out prompt continued by both models, greedily."""

    domain: str
    prompt: str
    before: str
    after: str
    reference: str


class Cost(BaseModel):
    """What a model takes to run."""

    bytes: int
    """Weights in the saved checkpoint."""
    load_seconds: float | None
    """None: the model came from memory or was streamed."""
    tokens_per_second: float | None
    """Greedy generation, one sequence. None: the model was streamed."""


class Coverage(BaseModel):
    """How well calibration reached the experts."""

    experts: int
    unseen: int
    """Experts that served no calibration token."""
    thin: int
    """Experts that served fewer than `needed`, the unseen ones among them."""
    needed: int
    median_tokens: float


class FitReport(BaseModel):
    """The record of one fit."""

    model: str
    request: str
    """The budget as it was asked for."""
    saliency: str
    seed: int
    calibration: dict[str, int]
    """Calibration tokens by domain; the order of the rows of LayerChoice.tokens."""
    layers: list[LayerChoice]
    coverage: Coverage
    losses: list[DomainLoss]
    """One for each domain: those of the task first."""
    before: Cost
    after: Cost
    samples: list[Sample]
    samples_withheld: bool = False
    """Whether there were samples, which hold text of the user, and they were not to be written."""
    streamed: bool = False
    """Whether the models were run layer by layer from disk, which is too slow to generate with."""
    warnings: list[str]
    date: datetime
    versions: dict[str, str]
    machine: str

    def without_samples(self) -> FitReport:
        """The same record without any text of the user."""
        return self.model_copy(update={"samples": [], "samples_withheld": bool(self.samples)})

    def mean_loss(self, *, task: bool) -> tuple[float, float] | None:
        """Mean over the domains of the task, or of the rest: (before, after). None where there are none."""
        chosen = [d for d in self.losses if d.task == task]
        if not chosen:
            return None
        return sum(d.before for d in chosen) / len(chosen), sum(d.after for d in chosen) / len(chosen)
