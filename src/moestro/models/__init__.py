"""Whole architectures, and the blocks that the language model knows by name."""

import moestro.models.rexmoe  # noqa: F401  puts its block into BLOCKS
