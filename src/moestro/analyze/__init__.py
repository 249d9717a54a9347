"""Observers of experts, and what they conclude."""
