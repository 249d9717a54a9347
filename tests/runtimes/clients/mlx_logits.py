"""Logits of mlx-lm on the CPU."""

from pathlib import Path

import job
import mlx.core as mx
import numpy
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)


def measure(item):
    model, _ = load_model(Path(item["path"]))
    if item["dtype"] != "saved":
        model.set_dtype(getattr(mx, item["dtype"]))
    logits = model(mx.array(job.load_ids(item)))
    job.save_logits(item, numpy.array(logits.astype(mx.float32)))


job.run(measure, ["mlx-lm", "mlx"])
