"""The YAML file of `moestro train`: model, data and plan, checked before anything is built.

model:                          # sizes and parts of a native model, under MoELMConfig's names
  hidden_size: 192
  num_hidden_layers: 6
  num_experts: 32
  num_experts_per_tok: 4
  router: {kind: sigmoid, bias_rate: 0.001}
# model: {checkpoint: quartet}  # or any causal language model, to train it further
tokenizer: quartet              # a bundled model, a directory or a hub name; quartet's by default
data:
  sources: [embedded]           # files, folders, LABEL=FILE, embedded domains
  tasks: {arithmetic: 2000}     # generated texts, by task
  row: 256                      # tokens of a row
plan:
  tokens: 2_000_000             # or steps
  batch_rows: 16
  precision: bf16
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers import PreTrainedConfig

from moestro.bundled import bundled_path
from moestro.data import Document, load_texts, places_of, split_heldout, tasks
from moestro.directories import some_path
from moestro.models.lm import MoELMConfig, MoELMForCausalLM
from moestro.train.packing import Rows, pack_documents
from moestro.train.plan import Plan
from moestro.view.experts import is_experts, num_experts_of
from moestro.view.layers import load, load_tokenizer

TASKS = {name: getattr(tasks, name) for name in ("arithmetic", "sorting", "retrieval", "instructions")}
UNUSED = {"decoder_sparse_step", "mlp_only_layers", "output_router_logits", "router_aux_loss_coef", "use_cache"}
"""Keys of Qwen3MoeConfig that a native model has others for, or that say nothing about training."""
DECIDED = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "fused_loss", "use_sliding_window"}
"""What the tokenizer and the trainer decide about."""


class Data(BaseModel):
    """What to train on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[str, ...] = ()
    tasks: dict[str, int] = {}
    row: int = Field(512, ge=2)
    heldout: float = Field(0.05, gt=0, lt=1)
    """Share of every domain that is not trained on, where its source does not declare held-out documents."""

    @field_validator("sources", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known(self) -> Data:
        if unknown := sorted(set(self.tasks) - set(TASKS)):
            raise ValueError(f"tasks: {unknown[0]!r} is not known; there are {', '.join(TASKS)}")
        if not self.sources and not self.tasks:
            raise ValueError("names neither sources nor tasks")
        return self


class Config(BaseModel):
    """One file. `plan` is kept as written until the rows' length is known (`plan_for`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "training"
    model: dict[str, Any]
    tokenizer: str | None = None
    data: Data
    plan: dict[str, Any]

    @field_validator("model")
    @classmethod
    def _model(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "checkpoint" in value:
            if others := sorted(set(value) - {"checkpoint"}):
                raise ValueError(f"a checkpoint brings its own sizes; leave out {', '.join(others)}")
            return value
        known = model_keys()
        if unknown := sorted(set(value) - known):
            raise ValueError(unknown_key(unknown[0], known))
        return value

    def plan_for(self, row: int) -> Plan:
        """The plan; `tokens` becomes steps."""
        given = dict(self.plan)
        tokens = given.pop("tokens", None)
        if (tokens is None) == ("steps" not in given):
            raise ValueError("plan: give either tokens or steps")
        if tokens is not None:
            batch = int(given.get("batch_rows", Plan.model_fields["batch_rows"].default)) * row
            if int(tokens) < batch:
                raise ValueError(f"plan: tokens={tokens:,} is less than one batch of {batch:,} tokens")
            given["steps"] = int(tokens) // batch
        try:
            return Plan(**given)
        except ValidationError as error:
            raise ValueError(explain(error, "plan.", Plan)) from None


def model_keys() -> set[str]:
    """What `model:` may hold."""
    own = set(MoELMConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    return {"checkpoint", "head_dim", *own} - UNUSED - DECIDED


def read_config(path: Path) -> Config:
    """The file's content, checked; raises ValueError that names the key at fault and the known ones."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold the keys {', '.join(Config.model_fields)}")
    try:
        config = Config(**content)
        config.plan_for(config.data.row)
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error, '', Config)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def explain(error: ValidationError, prefix: str, model: type[BaseModel]) -> str:
    """pydantic's first complaint as `key: what is wrong`."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = prefix + ".".join(place)
    if first["type"] == "extra_forbidden":
        fields = Data.model_fields if place[0] == "data" else model.model_fields
        known = set(fields) | ({"tokens"} if model is Plan else set())
        return f"{prefix}{'.'.join(place[:-1])}{'.' if place[1:] else ''}{unknown_key(place[-1], known)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    text = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict | BaseModel) else f" (given {first['input']!r})"
    return f"{key}: {text}{given}" if key else text


def unknown_key(key: str, known: set[str]) -> str:
    """The key, the nearest known one, and all of them."""
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{key} is not known; {hint}there are {', '.join(sorted(known))}"


# ------------------------------------------------------------------------------------------------ what it builds


def tokenizer_of(config: Config) -> Any:
    """The tokenizer that the file names; the checkpoint's, or quartet's, where it names none."""
    name = config.tokenizer or config.model.get("checkpoint") or "quartet"
    tokenizer = load_tokenizer(bundled_path(name) or name)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer; name one under tokenizer")
    return tokenizer


def made_of(config: Config, seed: int) -> dict[str, Any]:
    """All that decides which tokens a run sees."""
    tokenizer = config.tokenizer or config.model.get("checkpoint") or "quartet"
    return {"data": config.data.model_dump(mode="json"), "tokenizer": str(tokenizer), "plan": {"seed": seed}}


def places_read(config: Config) -> list[Path]:
    """The directories and files that a run reads: its model, tokenizer and texts."""
    names = [name for name in (config.tokenizer, config.model.get("checkpoint")) if name is not None]
    found = [bundled_path(name) or some_path(name, "model or tokenizer") for name in names]
    return [*(path for path in found if path.exists()), *places_of(list(config.data.sources))]


def model_of(config: Config, tokenizer: Any, seed: int) -> Any:
    """A fresh native model, or the checkpoint, in fp32."""
    import torch

    if "checkpoint" in config.model:
        name = config.model["checkpoint"]
        model, _, _ = load(bundled_path(name) or name, dtype=torch.float32)
        return model
    torch.manual_seed(seed)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    sizes = {"max_position_embeddings": config.data.row, "vocab_size": len(tokenizer), **ids, **config.model}
    return MoELMForCausalLM(MoELMConfig(**sizes))


def rows_of(config: Config, tokenizer: Any, seed: int) -> tuple[Rows, Rows]:
    """(training rows, held-out rows)."""
    documents = list(load_texts(list(config.data.sources), split="all")) if config.data.sources else []
    for name, count in config.data.tasks.items():
        documents += [Document(text=problem.text, domain=name) for problem in TASKS[name](seed, count)]
    train, heldout = split_heldout(documents, config.data.heldout, seed=seed)
    length = config.data.row
    return (
        pack_documents(train, tokenizer, length, seed=seed),
        pack_documents(heldout, tokenizer, length, seed=seed, split="held-out"),
    )


def parameter_counts(model: Any) -> tuple[int, int]:
    """(all parameters, those that one token uses): of an expert layer the share that is chosen."""
    total = sum(p.numel() for p in model.parameters())
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    idle = 0.0
    for module in model.modules():
        if is_experts(module) and chosen:
            size = sum(p.numel() for p in module.parameters())
            idle += size * (1 - min(1.0, chosen / num_experts_of(module)))
    return total, total - round(idle)
