"""Prompts of the generated tasks with exact answers, and how many of them a model completes: a score for steering.

The problems stand in the embedded sample, in documents of one task, a line each (a chat turn in the instructions). A
prompt is a problem after the `SHOTS` solved ones before it, as the bundled models read them in training. None of these
problems was trained on. The "calibration" part serves to choose settings, the "heldout" part to report.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moestro.data import embedded
from moestro.data.embedded_sample import Split
from moestro.data.tasks import ASSISTANT, END, USER

TASKS = ("arithmetic", "sorting", "retrieval", "instructions")
SHOTS = 3
BATCH = 64
LINE = re.compile(r"(?P<prompt>.*(?:=|->|\|))(?P<answer> .*)")
TURN = re.compile(f"(?P<prompt>{re.escape(USER)}.*?{re.escape(ASSISTANT)})(?P<answer>.*?){re.escape(END)}", re.DOTALL)


class Prompt(NamedTuple):
    task: str
    text: str
    answer: str


def task_prompts(task: str, split: Split, count: int, *, seed: int = 0) -> list[Prompt]:
    """`count` prompts, drawn without repetition. Raises ValueError where there are too few."""
    found = []
    for document in embedded(task, split):
        text = document.text or ""
        pattern = TURN if task == "instructions" else LINE
        problems = list(pattern.finditer(text))
        for first, last in zip(problems, problems[SHOTS:]):
            found.append(Prompt(task, text[first.start() : last.end("prompt")], last["answer"].strip()))
    if count > len(found):
        raise ValueError(f"{count} prompts of {task}; the {split} part has {len(found)}")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[i] for i in order[:count].tolist()]


def left_padded(rows: Sequence[Sequence[int]], padding: int) -> dict[str, Tensor]:
    """Ids and mask of rows of different lengths, padded on the left."""
    length = max(map(len, rows))
    ids = torch.tensor([[padding] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def batches(view: Any, prompts: Sequence[Prompt], size: int = BATCH) -> list[tuple[list[int], dict[str, Any]]]:
    """[(numbers of the prompts, arguments for `generate`)]: prompts of one task and of similar lengths together."""
    tokenizer, config = view.tokenizer, view.model.generation_config
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids = [tokenizer(p.text, verbose=False)["input_ids"] for p in prompts]
    long = [len(tokenizer(p.answer, add_special_tokens=False)["input_ids"]) for p in prompts]
    made = []
    for task in dict.fromkeys(p.task for p in prompts):
        own = sorted((i for i, p in enumerate(prompts) if p.task == task), key=lambda i: len(ids[i]))
        for start in range(0, len(own), size):
            numbers = own[start : start + size]
            options = dict(
                max_new_tokens=max(long[i] for i in numbers) + 2,
                eos_token_id=[*np.atleast_1d(config.eos_token_id).tolist(), newline],
                pad_token_id=tokenizer.pad_token_id,
                do_sample=False,
            )
            made.append((numbers, {**left_padded([ids[i] for i in numbers], tokenizer.pad_token_id), **options}))
    return made


def answered(view: Any, prompts: Sequence[Prompt], generate: Any = None, **options: Any) -> NDArray[np.float64]:
    """1 for every prompt whose answer the model writes exactly, else 0.

    `generate`: takes the arguments of the model's own `generate`, and gives sequences; `options` go to it as well.
    """
    right = np.zeros(len(prompts))
    for numbers, arguments in batches(view, prompts):
        out = (generate or view.model.generate)(**arguments, **options)
        new = out[:, arguments["input_ids"].shape[1] :]
        for i, text in zip(numbers, view.tokenizer.batch_decode(new, skip_special_tokens=True)):
            right[i] = text.split("\n")[0].strip() == prompts[i].answer
    return right
