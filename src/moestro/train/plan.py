"""What a training run does: its length, its batches, its learning rate.

cosine      linear warm-up, then a half cosine down to `final_share` of the peak ("SGDR", arXiv:1608.03983)
trapezoid   linear warm-up, constant, then linear to zero over the last `decay_share` (arXiv:2405.18392)
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["fp32", "bf16"]


class Plan(BaseModel):
    """Hyperparameters of one run. A batch is what one optimiser step sees, over all processes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1)
    batch_rows: int = Field(16, ge=1)
    micro_rows: int | None = Field(None, ge=1)
    """Rows that are computed at a time: gradients of a batch are added up; None for the whole batch."""
    peak_rate: float = Field(3e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    schedule: Literal["cosine", "trapezoid"] = "cosine"
    final_share: float = Field(0.1, ge=0, le=1)
    decay_share: float = Field(0.35, gt=0, le=1)
    weight_decay: float = Field(0.1, ge=0)
    """On matrices; vectors (norms, biases) have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = Field(1.0, gt=0)
    precision: Precision = "fp32"
    """What is computed in; weights, gradients' sums and optimiser are fp32."""
    router_losses: dict[str, float | dict[str, Any]] | None = None
    """{name in LOSSES: coefficient}, for transformers' models; native ones have theirs in their config."""
    shuffle: bool = True
    """Rows in an order drawn anew for every pass; else as they lie."""
    seed: int = 0
    log_every: int = Field(25, ge=1)
    save_every: int = Field(100, ge=1)
    evaluate_every: int = Field(300, ge=1)
    evaluate_rows: int = Field(4, ge=1)
    """Held-out rows per domain at most."""

    @model_validator(mode="after")
    def _divides(self) -> Plan:
        if self.batch_rows % self.micro:
            raise ValueError(f"batch_rows={self.batch_rows} is not a multiple of micro_rows={self.micro}")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} of {self.steps} steps; warm up for fewer")
        return self

    @property
    def micro(self) -> int:
        return self.micro_rows or self.batch_rows

    def rate(self, step: int) -> float:
        """Learning rate of `step`."""
        up = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "trapezoid":
            decay_from = round(self.steps * (1 - self.decay_share))
            down = 1.0 if step < decay_from else (self.steps - step) / (self.steps - decay_from)
        else:
            done = max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
            down = self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * done))
        return self.peak_rate * up * down

    def settings(self) -> dict[str, Any]:
        """What decides about the weights: a resumed run must have the same."""
        reporting = {"log_every", "save_every", "evaluate_every", "evaluate_rows"}
        return self.model_dump(mode="json", exclude=reporting)
