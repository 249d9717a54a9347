"""The bundled models' tokenizer: byte-level BPE with single digits, saved as a plain PreTrainedTokenizerFast."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moestro.data.tasks import ASSISTANT, END, USER
from moestro.train.corpus import WEIGHTS, Document

VOCABULARY = 6144
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
TRAINING_BYTES = 12_000_000

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    f"{{% if message['role'] == 'assistant' %}}{ASSISTANT}{{% else %}}{USER}{{% endif %}}"
    f"{{{{ message['content'] }}}}{END}\n"
    f"{{% endfor %}}{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)


def mixed_sample(documents: list[Document], budget: int, seed: int) -> Iterator[str]:
    """Training documents, shuffled, up to each domain's share of `budget` bytes."""
    train = [document for document in documents if document.split == "train"]
    random.Random(seed).shuffle(train)
    left = {domain: share * budget for domain, share in WEIGHTS.items()}
    for document in train:
        if left[document.domain] > 0:
            left[document.domain] -= len(document.text.encode())
            yield document.text


def train_tokenizer(
    documents: list[Document], *, vocabulary: int = VOCABULARY, seed: int = 0
) -> PreTrainedTokenizerFast:
    """Learn the merges from a sample that is mixed like the training data."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(mixed_sample(documents, TRAINING_BYTES, seed), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[USER, ASSISTANT, END],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def load_or_train(folder: Path, documents: list[Document]) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `folder`; trained and saved on first use."""
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(documents).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
