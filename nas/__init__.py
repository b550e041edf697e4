"""Neural architecture search for the KV groups of every layer of a language model."""

from pathlib import Path

__version__ = "0.1.0"


def shipped(folder: str) -> Path:
    """The path of conf/, search_spaces/ or latency_models/: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / folder if (package / folder).is_dir() else package.parent / folder
