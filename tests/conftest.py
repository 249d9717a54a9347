"""Every test runs offline, on one thread, from a fixed seed, with the shapes of public signatures checked."""

import os
import sys
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception
from hypothesis import settings
from jaxtyping import install_import_hook


def checked(function: Callable) -> Callable:
    """beartype, but for the few functions that name `Self`, which it only takes on whole classes."""
    try:
        return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
    except BeartypeDecorHintPep673Exception:
        return function


assert not any(name.split(".")[0] == "moestro" for name in sys.modules), "shapes can only be checked from the import on"
install_import_hook("moestro", "conftest.checked")

torch.set_num_threads(1)
settings.register_profile("moestro", deadline=None, derandomize=True, max_examples=10)
settings.load_profile("moestro")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
