"""Recipes: what is done to a model for good, as plain data.

A `Recipe` is an ordered list of operations, what it was made on, and where the statistics behind it lie. It knows no
model: `view.check(recipe)`, `view.apply(recipe)` and `moestro apply` carry it out, a saved checkpoint carries it in
moestro.json, with the recipes of earlier checkpoints (its lineage).

An operation is a frozen dataclass that says which experts are left (`kept`), whether a sibling
checkpoint can have it too (`portable`), and its JSON form. A new one is a class here, in OPERATIONS, and a function in
`moestro.view.operations.DO`. Layers are addressed by the name of their MoE block ("model.layers.3.mlp"); the number of
the decoder layer ("3") will do where only one layer has it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

SCHEMA = 1
"""Version of the JSON form; another one is refused."""
NOTES = "moestro.json"
"""The file of a checkpoint directory that carries its recipe and lineage."""

Portable = Literal["as it is", "needs data", "no"]


@runtime_checkable
class Operation(Protocol):
    """What every operation offers."""

    kind: ClassVar[str]
    portable: ClassVar[Portable]

    def layers(self) -> list[str] | None:
        """The layers that it names; None: all."""
        ...

    def on(self, names: Mapping[str, str]) -> Self:
        """The same for layers of other names: {name here: name there}; layers that are not in `names` are left out."""
        ...

    def kept(self) -> dict[str, list[int]]:
        """{layer whose experts it changes: for each expert after it, which earlier one it goes on from}."""
        ...

    def to_data(self) -> dict[str, Any]:
        """As JSON has it, without the kind."""
        ...

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError where `data` is not what `to_data` gives."""
        ...


@dataclass(frozen=True)
class Keep:
    """Drop all experts of the layers but these, which stay in this order."""

    kind: ClassVar[str] = "keep"
    portable: ClassVar[Portable] = "as it is"
    experts: dict[str, list[int]]

    def layers(self) -> list[str] | None:
        return list(self.experts)

    def on(self, names: Mapping[str, str]) -> Keep:
        return Keep({names[n]: ids for n, ids in self.experts.items() if n in names})

    def kept(self) -> dict[str, list[int]]:
        return self.experts

    def to_data(self) -> dict[str, Any]:
        return {"experts": self.experts}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Keep:
        (experts,) = _fields(cls, data, "experts")
        return keep(experts)


@dataclass(frozen=True)
class Merge:
    """Make each cluster of experts one, their mean weighted by `weights` (one number per expert; None: equal)."""

    kind: ClassVar[str] = "merge"
    portable: ClassVar[Portable] = "as it is"
    clusters: dict[str, list[list[int]]]
    weights: dict[str, list[float]] | None = None

    def layers(self) -> list[str] | None:
        return [*dict.fromkeys([*self.clusters, *(self.weights or ())])]

    def on(self, names: Mapping[str, str]) -> Merge:
        weights = self.weights and {names[n]: w for n, w in self.weights.items() if n in names}
        return Merge({names[n]: groups for n, groups in self.clusters.items() if n in names}, weights)

    def kept(self) -> dict[str, list[int]]:
        return {name: [min(group) for group in groups] for name, groups in self.clusters.items()}

    def to_data(self) -> dict[str, Any]:
        return {"clusters": self.clusters, "weights": self.weights}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Merge:
        clusters, weights = _fields(cls, data, "clusters", "weights")
        return merge(clusters, weights)


@dataclass(frozen=True)
class SetTopK:
    """Let every token use `top_k` experts in all layers."""

    kind: ClassVar[str] = "set_top_k"
    portable: ClassVar[Portable] = "as it is"
    top_k: int

    def layers(self) -> list[str] | None:
        return None

    def on(self, names: Mapping[str, str]) -> SetTopK:
        return self

    def kept(self) -> dict[str, list[int]]:
        return {}

    def to_data(self) -> dict[str, Any]:
        return {"top_k": self.top_k}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> SetTopK:
        (top_k,) = _fields(cls, data, "top_k")
        return set_top_k(top_k)


OPERATIONS: dict[str, type[Any]] = {op.kind: op for op in (Keep, Merge, SetTopK)}
"""Operations by the name that JSON gives them."""


def keep(experts: Mapping[Any, Any]) -> Keep:
    """{layer: experts to keep}, whatever holds the ids: they become plain ints once, here.

    Raises ValueError for ids that are no whole numbers or are named twice.
    """
    return Keep({name: plain_ids(ids, f"layer {name}") for name, ids in _named(experts, "experts to keep")})


def merge(clusters: Mapping[Any, Any], weights: Mapping[Any, Any] | None = None) -> Merge:
    """{layer: [[ids], ...]}, each cluster a new expert; `weights`: {layer: one number per old expert}."""
    plain = {}
    for name, groups in _named(clusters, "clusters"):
        where = f"layer {name}"
        plain[name] = [plain_ids(group, where) for group in groups]
        if not all(plain[name]):
            raise ValueError(f"{where}: an empty cluster")
        twice = Counter(e for group in plain[name] for e in group).most_common(1)
        if twice and twice[0][1] > 1:
            raise ValueError(f"{where}: expert {twice[0][0]} is in two clusters")
    if weights is None:
        return Merge(plain)
    given = {name: _floats(w, f"merge weights of layer {name}") for name, w in _named(weights, "weights")}
    return Merge(plain, given)


def set_top_k(top_k: Any) -> SetTopK:
    """`top_k`: a whole number."""
    return SetTopK(_plain_int(top_k, "top_k"))


def plain_ids(ids: Any, where: str) -> list[int]:
    """Ids from a list, range, iterator, array or tensor as a list of ints.

    Raises ValueError for anything but whole numbers (3.0 and True are none), and for ids named twice.
    """
    if isinstance(ids, str | bytes | Mapping) or not hasattr(ids, "__iter__"):
        raise ValueError(f"{where}: {ids!r} is no list of experts; give their numbers, [0, 3, 5] say")
    if isinstance(ids, set | frozenset):
        ids = sorted(ids)
    listed = ids.tolist() if hasattr(ids, "tolist") else ids
    plain = [_plain_int(e, where) for e in (listed if hasattr(listed, "__iter__") else [listed])]
    if len(set(plain)) != len(plain):
        raise ValueError(f"{where}: expert {Counter(plain).most_common(1)[0][0]} is named twice")
    return plain


def _plain_int(value: Any, where: str) -> int:
    one = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    if type(one) is not int:
        raise ValueError(
            f"{where}: {value!r} ({type(one).__name__}) is no expert's number; give whole numbers (of a mask, those "
            "of its true entries: mask.nonzero())"
            if where != "top_k"
            else f"top_k={value!r} is no whole number"
        )
    return one


def _named(by_layer: Any, what: str) -> list[tuple[str, Any]]:
    if not isinstance(by_layer, Mapping):
        raise ValueError(f"{what} are given by layer, {{layer: ...}}; got {type(by_layer).__name__}")
    named = [(n if isinstance(n, str) else str(_plain_int(n, "a layer")), value) for n, value in by_layer.items()]
    if len(dict(named)) != len(named):
        raise ValueError(f"{what} name layer {Counter(n for n, _ in named).most_common(1)[0][0]} twice")
    return named


def _floats(values: Any, where: str) -> list[float]:
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    if not isinstance(listed, list) or any(isinstance(v, list | bool | str) for v in listed):
        raise ValueError(f"{where}: give one number per expert")
    numbers = [float(v) for v in listed]
    if wrong := [v for v in numbers if not math.isfinite(v)]:
        raise ValueError(f"{where}: {wrong[0]} is no weight; give finite numbers (0 for an expert that has no say)")
    return numbers


def _json(data: Any) -> str:
    """With every list of numbers on one line."""
    text = json.dumps(data, indent=1, allow_nan=False)
    return re.sub(r"\[[\d\s,.eE+-]*\]", lambda found: " ".join(found.group().split()), text)


def _read(file: Path) -> Any:
    """What a JSON file holds. Raises ValueError also where a name is given twice: one of the two would be lost."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r} is given twice")
        return dict(pairs)

    return json.loads(file.read_text(), object_pairs_hook=once)


def _fields(cls: Any, data: Any, *names: str) -> list[Any]:
    if not isinstance(data, Mapping) or set(data) != set(names):
        got = sorted(data) if isinstance(data, Mapping) else type(data).__name__
        raise ValueError(f"operation {cls.kind!r} has {', '.join(names)}; this one has {got}")
    return [data[name] for name in names]


@dataclass(frozen=True)
class MadeOn:
    """The model that a recipe was made for, by what another model must have in common with it."""

    architecture: str
    experts: dict[str, int]
    """{name of the MoE block: experts}"""
    top_k: dict[str, int]

    def difference(self, other: MadeOn) -> str | None:
        """The first way in which `other` is not alike, in words; None where it is."""
        if self.architecture != other.architecture:
            return f"it was made on {self.architecture}, and this is {other.architecture}"
        if missing := [name for name in self.experts if name not in other.experts]:
            return f"it was made on a model with experts in {missing[0]}; here they are in {', '.join(other.experts)}"
        for what, mine, theirs in (("experts", self.experts, other.experts), ("top_k", self.top_k, other.top_k)):
            for name, value in mine.items():
                if theirs[name] != value:
                    return f"it was made on a model with {what} {value} in {name}; here it is {theirs[name]}"
        return None


@dataclass(frozen=True)
class Recipe:
    """Operations in order. `made_on`: None where they may be tried on any model."""

    operations: tuple[Operation, ...] = ()
    made_on: MadeOn | None = None
    statistics: str | None = None
    """Where the statistics lie that it was made from, relative to the file that holds the recipe."""
    note: str = field(default="", compare=False)
    """What it is for, in words: budget, saliency, task."""

    def counts(self, experts: Mapping[str, int]) -> dict[str, int]:
        """{layer: experts} after all operations."""
        after = dict(experts)
        for operation in self.operations:
            after |= {name: len(ids) for name, ids in operation.kept().items()}
        return after

    def on(self, resolve: Callable[[str], str]) -> Recipe:
        """The same with layers' names as `resolve` gives them. Raises ValueError where two become one."""
        operations = []
        for operation in self.operations:
            names = {name: resolve(name) for name in operation.layers() or ()}
            if twice := [n for n, times in Counter(names.values()).items() if times > 1]:
                raise ValueError(f"{operation.kind} names layer {twice[0]} twice")
            operations.append(operation.on(names))
        return replace(self, operations=tuple(operations))

    def check_portable(self) -> None:
        """Raise ValueError where a sibling of the model it was made on cannot have it by this recipe alone."""
        for number, operation in enumerate(self.operations, 1):
            if operation.portable != "as it is":
                way = (
                    "it holds numbers measured on one model: make a recipe for the other from data (moestro fit)"
                    if operation.portable == "needs data"
                    else "it is of use to the very model it was made on alone"
                )
                raise ValueError(f"operation {number} ({operation.kind}) cannot be repeated on another model: {way}")

    def to_data(self) -> dict[str, Any]:
        """As JSON has it."""
        made = self.made_on
        return {
            "schema": SCHEMA,
            "made_on": made and {"architecture": made.architecture, "experts": made.experts, "top_k": made.top_k},
            "operations": [{"kind": op.kind, **op.to_data()} for op in self.operations],
            "statistics": self.statistics,
            "note": self.note,
        }

    @classmethod
    def from_data(cls, data: Any) -> Recipe:
        """Raises ValueError for another schema, an unknown operation, or anything that `to_data` does not give."""
        if not isinstance(data, Mapping) or "operations" not in data:
            raise ValueError("this is no recipe: it has no operations")
        if data.get("schema") != SCHEMA or isinstance(data.get("schema"), bool):
            raise ValueError(
                f"this recipe has schema {data.get('schema')!r}, and this moestro reads schema {SCHEMA}; use the "
                "moestro that wrote it"
            )
        if unknown := set(data) - {"schema", "made_on", "operations", "statistics", "note"}:
            raise ValueError(f"this recipe has {sorted(unknown)[0]!r}, which schema {SCHEMA} does not know")
        if not isinstance(data["operations"], Sequence) or isinstance(data["operations"], str):
            raise ValueError("operations of a recipe are a list")
        for name in ("statistics", "note"):
            if not isinstance(data.get(name) or "", str):
                raise ValueError(f"{name} of a recipe is a text; this one has {data[name]!r}")
        operations = [_operation(op, number) for number, op in enumerate(data["operations"], 1)]
        return cls(tuple(operations), _made_on(data.get("made_on")), data.get("statistics"), data.get("note") or "")

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(_json(self.to_data()))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """From a recipe's JSON file, or a checkpoint directory that carries one (then with all of its lineage, one
        after the other).

        Raises FileNotFoundError or ValueError where there is none, or it cannot be read.
        """
        if not str(path).strip():
            raise ValueError(f"recipe={str(path)!r} names no file or directory; give its name")
        path = Path(path)
        if path.is_dir() and (path / "recipe.json").is_file() and not (path / NOTES).is_file():
            path = path / "recipe.json"
        file = path / NOTES if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"{path} is no recipe: give its JSON file, or a checkpoint that moestro saved")
        try:
            data = _read(file)
            if (
                isinstance(data, Mapping)
                and "operations" not in data
                and ("recipe" in data or "original_experts" in data)
            ):
                return _whole(Notes.from_data(data))
            return cls.from_data(data)
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from None


def _operation(data: Any, number: int) -> Any:
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if not isinstance(kind, str) or kind not in OPERATIONS:
        raise ValueError(f"operation {number} is {kind!r}; this moestro knows {', '.join(OPERATIONS)}")
    try:
        return OPERATIONS[kind].from_data({k: v for k, v in data.items() if k != "kind"})
    except (TypeError, AttributeError) as e:
        raise ValueError(f"operation {number} ({kind}) is not understood: {e}") from None


def _made_on(data: Any) -> MadeOn | None:
    if data is None:
        return None
    if not isinstance(data, Mapping) or set(data) != {"architecture", "experts", "top_k"}:
        raise ValueError("made_on of a recipe has architecture, experts and top_k")
    experts, top_k = ({n: _plain_int(v, n) for n, v in _named(data[key], key)} for key in ("experts", "top_k"))
    if set(experts) != set(top_k):
        raise ValueError("made_on of a recipe gives experts and top_k of different layers")
    return MadeOn(str(data["architecture"]), experts, top_k)


# --- what a checkpoint carries ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Notes:
    """What moestro.json beside a checkpoint says.

    `original_ids`: {block name: for each present expert, its number in the first model of the lineage}; `numbers`:
    {block name: number of its decoder layer}.
    """

    recipe: Recipe = Recipe()
    lineage: tuple[Recipe, ...] = ()
    """The recipes of the checkpoints before this one, oldest first."""
    original_ids: dict[str, list[int]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        unique = {i for i, times in Counter(self.numbers.values()).items() if times == 1}
        return {
            "original_experts": {
                str(i) if (i := self.numbers.get(name)) in unique else name: ids
                for name, ids in self.original_ids.items()
            },
            "original_ids": self.original_ids,
            "recipe": self.recipe.to_data(),
            "lineage": [recipe.to_data() for recipe in self.lineage],
        }

    @classmethod
    def from_data(cls, data: Any) -> Notes:
        """Also of the older form, which has `original_experts` by layer number alone. Raises ValueError as Recipe."""
        if not isinstance(data, Mapping):
            raise ValueError("this is no note of moestro's")
        ids = data.get("original_ids", data.get("original_experts")) or {}
        return cls(
            Recipe.from_data(data["recipe"]) if data.get("recipe") else Recipe(),
            tuple(Recipe.from_data(recipe) for recipe in data.get("lineage") or ()),
            {name: plain_ids(listed, f"layer {name}") for name, listed in _named(ids, "original experts")},
        )

    def write(self, directory: str | Path) -> None:
        """Write moestro.json into a checkpoint directory."""
        (Path(directory) / NOTES).write_text(_json(self.to_data()))

    @classmethod
    def read(cls, directory: str | Path) -> Notes | None:
        """Those of a checkpoint directory; None where it has none. Raises ValueError where they cannot be read."""
        file = Path(directory) / NOTES
        if not file.is_file():
            return None
        try:
            return cls.from_data(_read(file))
        except ValueError as e:
            raise ValueError(f"{file}: {e}; delete it to open the checkpoint without its history") from None


def annotate(directory: str | Path, *, statistics: str, note: str) -> None:
    """Say in a checkpoint's moestro.json where the statistics behind its recipe lie, and what it is for."""
    file = Path(directory) / NOTES
    data = json.loads(file.read_text())
    data["recipe"] |= {"statistics": statistics, "note": note}
    file.write_text(_json(data))


def _whole(notes: Notes) -> Recipe:
    """All that was done since the first model of the lineage, as one recipe. Raises ValueError where it is unknown."""
    parts = [recipe for recipe in (*notes.lineage, notes.recipe) if recipe.operations]
    if not parts:
        if any(ids != list(range(len(ids))) for ids in notes.original_ids.values()):
            raise ValueError("it names the experts that were kept and no recipe: it was saved by an older moestro")
        return notes.recipe
    operations = tuple(op for recipe in parts for op in recipe.operations)
    return replace(parts[-1], operations=operations, made_on=parts[0].made_on)
