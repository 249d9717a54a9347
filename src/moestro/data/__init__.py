"""Data to calibrate and evaluate on: labelled texts, held-out parts, token batches, the embedded sample."""

from moestro.data.batches import TokenBatch, TokenBatches, limit_tokens, token_batches
from moestro.data.documents import Document, split_heldout
from moestro.data.embedded_sample import embedded, embedded_domains
from moestro.data.texts import load_texts, places_of

__all__ = [
    "Document",
    "TokenBatch",
    "TokenBatches",
    "embedded",
    "embedded_domains",
    "limit_tokens",
    "load_texts",
    "places_of",
    "split_heldout",
    "token_batches",
]
