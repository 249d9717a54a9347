"""Edits and adaptation at inference: what a model does changes, its weights stay."""
