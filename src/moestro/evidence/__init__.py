"""Evidence: one module per paper, with what it claims and its scaled-down experiment, run here and measured."""
