"""Where the data that ships with the package lies: conf/, search_spaces/ and latency_models/.

An installed wheel carries the three folders inside the package; in a checkout they stand beside it.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(folder: str) -> Path:
    """Absolute path of a shipped folder, e.g. ``shipped("search_spaces")``."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder
