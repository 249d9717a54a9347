"""What belongs to a checkpoint beside weights and config: tokenizer, processors, templates, licence, generation config.

What was not changed is copied byte for byte: writing it anew would rename classes and drop keys that others want.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.jinja",
    "additional_chat_templates/*",
)
OTHERS = ("*processor*.json", "LICEN[SC]E*", "NOTICE*", "COPYING*", "USE_POLICY*", "*.txt")
GENERATION = "generation_config.json"


def write_companions(directory: Path, source: Path | None, tokenizer: Any, generation_config: Any) -> None:
    """Write them into `directory`: copies of the `source` directory's, and the tokenizer and generation config anew
    where they are others than those of the source."""
    if source is not None:
        _copy(source, directory, OTHERS)
        if tokenizer is None or _same_tokenizer(source, tokenizer):
            _copy(source, directory, TOKENIZER)
            tokenizer = None
    if tokenizer is not None:
        write_tokenizer(tokenizer, directory)
    if source is not None:
        _copy_code(source, directory)
    if generation_config is not None:
        if source is not None and same_generation(source, generation_config):
            shutil.copyfile(source / GENERATION, directory / GENERATION)
        else:
            generation_config.save_pretrained(directory)


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Save a tokenizer so that transformers 4 (and with it mlx-lm and llama.cpp's converter) reads it as 5 does.

    transformers 5 names its general class `TokenizersBackend` and lists further special tokens under a key that 4 takes
    for a mapping; both read the older names.
    """
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return
    stated = json.loads(file.read_text(encoding="utf-8"))
    if stated.get("tokenizer_class") == "TokenizersBackend":
        stated["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(stated.get("extra_special_tokens"), list):
        stated["additional_special_tokens"] = stated.pop("extra_special_tokens")
    for key in ("backend", "is_local", "local_files_only"):  # of this process, not of the tokenizer
        stated.pop(key, None)
    file.write_text(json.dumps(stated, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(source: Path, target: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file() and file.suffix not in (".py", ".safetensors", ".bin"):
                place = target / file.relative_to(source)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, place)


def _same_tokenizer(source: Path, tokenizer: Any) -> bool:
    """Whether the tokenizer is that of the source directory: both write the same files."""
    from transformers import AutoTokenizer

    if not hasattr(tokenizer, "save_pretrained") or not any(next(source.glob(p), None) for p in TOKENIZER[:6]):
        return False
    try:
        original = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, AttributeError):  # one that needs code of its own: the given one is another
        return False
    if type(original) is not type(tokenizer):
        return False
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        original.save_pretrained(one)
        tokenizer.save_pretrained(other)
        return _content(Path(one)) == _content(Path(other))


def _content(folder: Path) -> dict[str, Any]:
    """{file: its bytes, or what its JSON says}, without where a tokenizer was loaded from."""
    found: dict[str, Any] = {}
    for file in folder.rglob("*"):
        if file.name == "tokenizer_config.json":
            stated = json.loads(file.read_text(encoding="utf-8"))
            found[file.name] = {k: v for k, v in stated.items() if k not in ("name_or_path", "is_local")}
        elif file.is_file():
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def _copy_code(source: Path, target: Path) -> None:
    """Python files that a copied tokenizer or processor names in its `auto_map`, and those that they import."""
    wanted: list[Path] = []
    for file in target.glob("*.json"):
        stated = json.loads(file.read_text(encoding="utf-8"))
        references = stated.get("auto_map") if isinstance(stated, dict) and file.name != "config.json" else None
        named = references.values() if isinstance(references, dict) else [references]
        for name in (n for entry in named for n in (entry if isinstance(entry, list | tuple) else [entry])):
            if isinstance(name, str) and "--" not in name:
                wanted.append(source / f"{name.rpartition('.')[0]}.py")
    seen: set[Path] = set()
    while wanted:
        file = wanted.pop()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        shutil.copyfile(file, target / file.name)
        imports = re.findall(r"^\s*from\s+\.(\w+)\s+import", file.read_text(encoding="utf-8"), re.MULTILINE)
        wanted += [source / f"{name}.py" for name in imports]


def same_generation(source: Path, config: Any) -> bool:
    """Whether a generation config is that of the source directory."""
    from transformers import GenerationConfig

    if not (source / GENERATION).is_file():
        return False
    theirs, ours = GenerationConfig.from_pretrained(source).to_dict(), config.to_dict()
    known = {key for key in theirs.keys() | ours.keys() if not key.startswith("_") and key != "transformers_version"}
    return all(theirs.get(key) == ours.get(key) for key in known)
