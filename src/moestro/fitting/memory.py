"""Whether a checkpoint fits into this machine's memory."""

from __future__ import annotations

import os
from pathlib import Path

from moestro.formats.source import Source, quantisation_of, stated_in
from moestro.formats.tensors import check_complete, weight_files

MEMINFO, LIMIT = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def check_fits(checkpoint: Path) -> None:
    """Raise ValueError where the checkpoint directory's weights are larger than the memory that is left.

    FileNotFoundError, ValueError: it is incomplete.
    """
    check_complete(checkpoint)
    size, left = loaded_bytes(checkpoint), available_bytes()
    if left is not None and size > left:
        once = " once they are dequantised" if quantisation_of(stated_in(checkpoint)) is not None else ""
        raise ValueError(
            f"{checkpoint} holds {size / 1e9:.2f} GB of weights{once}, and {left / 1e9:.2f} GB of memory are available:"
            " pass --stream (stream=True) to fit it layer by layer"
        )


def loaded_bytes(checkpoint: Path) -> int:
    """What the weights of a checkpoint directory take in memory: quantised ones are dequantised on loading."""
    if quantisation_of(stated_in(checkpoint)) is not None:
        return Source(checkpoint).plain_nbytes
    return sum(file.stat().st_size for file in weight_files(checkpoint))


def available_bytes() -> int | None:
    """Memory that can still be taken, file caches given up and a container's limit minded; None where unknown."""
    try:
        left = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
    if MEMINFO.is_file():  # sysconf's own count of free pages leaves file caches out
        fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        left = int(fields["MemAvailable"].split()[0]) * 1024
    if LIMIT.is_file() and (limit := LIMIT.read_text().strip()).isdigit():
        left = min(left, int(limit))
    return left
