"""Whole architectures."""
