"""What a run came from: the time, the commit, the versions and the machine."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import nas
from nas.hardware import cpu_name, nvml_facts

_PACKAGES = ("torch", "optuna", "numpy", "pandas", "hydra-core", "transformers", "tokenizers", "datasets", "moocore")


def now() -> str:
    """UTC in ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def provenance() -> dict[str, Any]:
    versions = {"gqa-nas": nas.__version__, "python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in _PACKAGES}
    device = {"cpu": cpu_name(), "gpu": nvml_facts() or None, "system": platform.platform()}
    return {"git": git_state(), "versions": versions, "device": device}


def git_state() -> dict[str, object] | None:
    """Commit of the checkout that the package runs from, or None for an installed wheel."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "provenance.py")  # fails in a checkout of something else
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
