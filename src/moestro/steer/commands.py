"""`moestro generate` and `moestro steer`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moestro.arguments import name_argument, path_argument

console, errors = Console(), Console(stderr=True)
steer = typer.Typer(
    no_args_is_help=True, help="Make, learn and read steering files: what to change in a running model."
)

Model = Annotated[str, typer.Argument(parser=name_argument, help="checkpoint directory, hub name or bundled model")]
Out = Annotated[Path, typer.Option(parser=path_argument, help="the steering file to write")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an existing steering file")]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="the text to go on from; - reads standard input")],
    steer: Annotated[
        list[Path] | None,
        typer.Option(parser=path_argument, help="steering file (see `moestro steer`); may be repeated"),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="generate without the steering first")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate at most", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="of sampling; 0 takes the likeliest token", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="sample from the tokens that hold this probability")] = 1.0,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    chat: Annotated[
        bool | None, typer.Option("--chat/--plain", help="use the chat template", show_default="where there is one")
    ] = None,
) -> None:
    """Generate text, token by token, with or without steering.

    Examples:

      moestro generate quartet "def add(a, b):" --plain

      moestro generate ./OLMoE "Once upon a time" --steer no-refusals.json --compare

      cat question.txt | moestro generate ./Qwen3-30B-A3B - --steer math.json --temperature 0.7
    """
    import moestro
    from moestro.steer.generation import generate as run
    from moestro.steer.steering import Steering

    setups = [Steering.load(path) for path in steer or ()]
    if compare and not setups:
        raise ValueError("--compare shows the text with and without steering: give a file with --steer")
    view = moestro.open(model, experts=bool(setups))  # without steering, a dense model will do
    text = sys.stdin.read() if prompt == "-" else prompt
    settings: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, chat=chat
    )
    for title, used in (("without steering", []), ("steered", setups)) if compare else ((None, setups),):
        if title is not None:
            console.rule(title)
        run(view, text, steering=used, on_text=lambda piece: print(piece, end="", flush=True), **settings)
        print()


@steer.command(name="set")
def set_(
    model: Model,
    out: Out,
    off: Annotated[list[str] | None, typer.Option(help="LAYER:EXPERT to close; others take its slots")] = None,
    on: Annotated[list[str] | None, typer.Option(help="LAYER:EXPERT that every token uses")] = None,
    gain: Annotated[list[str] | None, typer.Option(help="LAYER:EXPERT=FACTOR on its gate weight")] = None,
    head_gain: Annotated[list[str] | None, typer.Option(help="LAYER:HEAD=FACTOR on an attention head; 0: off")] = None,
    note: Annotated[str, typer.Option(help="what this is for, kept in the file")] = "",
    overwrite: Overwrite = False,
) -> None:
    """Write a steering file by hand. Every option may be repeated.

    Examples:

      moestro steer set quartet --out quiet.json --off 3:17 --off 4:2

      moestro steer set quartet --out louder.json --gain 2:5=2 --head-gain 1:0=0
    """
    import moestro
    from moestro import ForceOn, Gain, SwitchOff
    from moestro.steer.steering import Steering
    from moestro.view.heads import HeadGain

    _check_free(out, overwrite, model)
    edits: list[Any] = []
    if off:
        edits.append(SwitchOff({_member(text) for text in off}))
    if on:
        edits.append(ForceOn({_member(text) for text in on}))
    if gain:
        edits.append(Gain(dict(_factor(text) for text in gain)))
    if head_gain:
        edits.append(HeadGain(dict(_factor(text) for text in head_gain)))
    if not edits:
        raise ValueError("nothing to steer: give --off, --on, --gain or --head-gain")
    view = moestro.open(model)
    with view.edits(*edits):  # checks them
        pass
    Steering.of(view, *edits, learned_from="set by hand", note=note).save(out)
    console.print(f"written: {out}", highlight=False)


class Action(StrEnum):
    """What is done with the experts that were found."""

    off = "off"
    push = "push"
    force = "force"


@steer.command()
def learn(
    model: Model,
    toward: Annotated[
        Path, typer.Option(parser=path_argument, help="texts that show it: one a line, or .jsonl with `text`")
    ],
    against: Annotated[Path, typer.Option(parser=path_argument, help="texts of the same kind that do not")],
    out: Out,
    top: Annotated[int, typer.Option(help="how many experts", min=1)] = 10,
    action: Annotated[
        Action, typer.Option(help="push: raise their logits (--strength); off: close them; force: use them always")
    ] = Action.push,
    strength: Annotated[float, typer.Option(help="of push, in standard deviations; below 0 pushes away")] = 0.5,
    layers: Annotated[
        str | None, typer.Option(help="decoder layers to choose from: 8-35 or 3,4,7", show_default="all")
    ] = None,
    note: Annotated[str, typer.Option(help="what this is for, kept in the file")] = "",
    overwrite: Overwrite = False,
) -> None:
    """Find the experts that one kind of text uses more than another, and write a file that steers with them.

    The experts are ranked by how much larger a part of a text's tokens they serve in the texts --toward than in those
    --against (arXiv:2502.11096, arXiv:2510.04694). Intervals and p-values are over texts; p tells how often texts
    whose labels are exchanged give any expert so large a difference.

    The file holds numbers of experts, the names of the two files of texts without their directories, and the note: no
    text, and nothing that tells of this machine.

    Examples:

      moestro steer learn ./OLMoE --toward refused.txt --against answered.txt --action off --out no-refusals.json

      moestro steer learn ./Qwen3 --toward math.jsonl --against general.jsonl --layers 8-35 --out math.json
    """
    import numpy as np

    import moestro
    from moestro import ForceOn, SwitchOff
    from moestro.analyze.multilingual_routing import activation_delta, text_profiles
    from moestro.sets import top as best
    from moestro.stats import difference, largest_difference_test
    from moestro.steer.router_steering import SoftSteer
    from moestro.steer.steering import Steering

    _check_free(out, overwrite, model, toward, against)
    texts = {"toward": _prompts(toward), "against": _prompts(against)}
    view = moestro.open(model)
    chosen_layers = None if layers is None else _layers(layers, [layer.index for layer in view.layers])
    profiles = text_profiles(view, texts)
    shown, others = profiles.of("toward"), profiles.of("against")
    delta = activation_delta(shown, others)
    found = best(delta, top, layers=chosen_layers)
    candidates = [i for i in delta if chosen_layers is None or i in chosen_layers]
    tables = (np.concatenate([p.frequency[i].numpy() for i in candidates], axis=1) for p in (shown, others))
    p_values = largest_difference_test(*tables)
    places = [(layer, expert) for layer in candidates for expert in range(len(delta[layer]))]
    chance = dict(zip(places, p_values.tolist(), strict=True))
    table = Table("layer", "expert", "more of a text's tokens", "95% interval", "p, corrected")
    for layer, expert in found:
        interval = difference(*(p.frequency[layer][:, expert].numpy() for p in (shown, others)), paired=False)
        span = f"[{interval.low:+.3f}, {interval.high:+.3f}]"
        row = (layer, expert, f"{interval.estimate:+.3f}", span, f"{chance[layer, expert]:.3f}")
        table.add_row(*map(str, row))
    console.print(table)
    if doubtful := sum(chance[member] > 0.05 for member in found):
        errors.print(
            f"[yellow]warning:[/] {doubtful} of {top} may be there by chance (p > 0.05, corrected for the "
            f"{len(places)} experts looked at); give more texts, or a smaller --top"
        )
    edit: Any = {
        Action.off: lambda: SwitchOff(found),
        Action.force: lambda: ForceOn(found),
        Action.push: lambda: SoftSteer(found, strength=strength),
    }[action]()
    with view.edits(edit):
        pass
    source = f"{toward.name} ({len(texts['toward'])} texts) against {against.name} ({len(texts['against'])})"
    Steering.of(view, edit, learned_from=source, note=note).save(out)
    console.print(f"written: {out}\ntry it: moestro generate {model} PROMPT --steer {out} --compare", highlight=False)


@steer.command()
def show(
    file: Annotated[Path, typer.Argument(parser=path_argument, help="steering file")],
    model: Annotated[str | None, typer.Option(parser=name_argument, help="also check that it fits this model")] = None,
) -> None:
    """Tell what a steering file changes, and for which model."""
    import moestro
    from moestro.steer.steering import Steering

    setup = Steering.load(file)
    counts = sorted(set(setup.model.experts.values()))
    console.print(f"for {setup.model.architecture}: {len(setup.model.experts)} MoE layers of {counts} experts")
    if setup.learned_from:
        console.print(f"learned from {setup.learned_from}", highlight=False)
    if setup.note:
        console.print(setup.note, highlight=False)
    for edit in setup.edits:
        rest = {name: value for name, value in edit.items() if name != "kind"}
        console.print(f"{edit['kind']}: {_short(rest)}", highlight=False)
    if setup.decoding is not None:
        console.print(f"decoding: {setup.decoding.model_dump()}", highlight=False)
    if model is not None:
        view = moestro.open(model)
        setup.check(view)
        with setup.on(view):
            pass
        console.print(f"it fits {model}", highlight=False)


def _short(values: Any, limit: int = 300) -> str:
    text = ", ".join(f"{name} {value}" for name, value in values.items())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _check_free(out: Path, overwrite: bool, model: str, *texts: Path) -> None:
    """Refuse, before any work, an output that would replace something else than a steering file, or lie in the model's
    directory."""
    from moestro.bundled import bundled_path
    from moestro.directories import check_apart
    from moestro.steer.steering import Steering

    for path in texts:
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {str(path)!r} with texts")
    source = Path(model) if Path(model).exists() else bundled_path(model) or Path(model)
    check_apart(out, [source, *texts])
    if out.is_dir():
        raise FileExistsError(f"{out} is a directory, not a file; choose another name with --out")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another file with --out, or pass --overwrite")
    if not out.parent.exists():
        raise FileNotFoundError(f"{out.parent} is no directory; make it first")
    if out.exists():
        try:
            Steering.load(out)
        except ValueError as error:
            raise FileExistsError(f"{out} is not overwritten: it is no steering file; choose another name") from error


def _member(text: str) -> tuple[int, int]:
    layer, _, number = text.partition(":")
    if not (layer.isdigit() and number.isdigit()):
        raise ValueError(f"{text!r} does not name an expert or head; write LAYER:NUMBER, as in 3:17")
    return int(layer), int(number)


def _factor(text: str) -> tuple[tuple[int, int], float]:
    member, _, factor = text.partition("=")
    try:
        return _member(member), float(factor)
    except ValueError:
        raise ValueError(f"{text!r} gives no factor; write LAYER:NUMBER=FACTOR, as in 3:17=0.5") from None


def _layers(text: str, known: Sequence[int]) -> list[int]:
    """The decoder layers that "8-35" or "3,4,7" names. Raises ValueError for one without experts."""
    chosen: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdigit() or not (last.strip() or first).strip().isdigit():
            raise ValueError(f"--layers {text!r}: write 8-35, or 3,4,7")
        chosen += range(int(first), int(last or first) + 1)
    if missing := [i for i in chosen if i not in known]:
        raise ValueError(f"--layers {text!r}: decoder layer {missing[0]} has no experts; MoE layers are {list(known)}")
    return chosen


def _prompts(path: Path) -> list[str]:
    """The texts of a file: the lines of a .txt file, else what `load_texts` reads."""
    from moestro.data import load_texts

    if path.suffix == ".txt":
        found = [line for line in path.read_text().splitlines() if line.strip()]
    else:
        found = [d.text for d in load_texts(path, split="all") if d.text]
    if len(found) < 2:
        raise ValueError(f"{path} holds {len(found)} texts; give two at least, one a line: an interval needs them")
    return found
