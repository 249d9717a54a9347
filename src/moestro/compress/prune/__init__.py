"""Pruning: score the experts, keep the best under a budget. One file per published saliency."""
