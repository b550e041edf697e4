"""Exported models. A format is one module here and one YAML in conf/export that names its class."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nas.config import build
from nas.model import Decoder
from nas.shape import ModelShape


class Exporter(Protocol):
    """A format of models on disk: a folder for each. `hf`, which other commands start from, has a ``read`` too."""

    of_served: bool  # whether `nas export` gives it the served shape, on the meta device, not the supernet's weights

    def check(self, shape: ModelShape, tokenizer: Path | None) -> None:
        """Refuses (`UserError`) what the format cannot hold; called before anything is written."""

    def write(self, model: Decoder, tokenizer: Path | None, folder: Path, card: Mapping[str, str]) -> None:
        """Writes ``model``, its ``tokenizer`` (a tokenizer.json) and a model card that states ``card``, by title."""


def exporters(config: Mapping[str, Any]) -> list[tuple[Exporter, Path]]:
    """The formats that a config's ``export`` names, each with the folder for its models below the run's.

    That is the run's itself, but of several formats each has one by its name.
    """
    formats = {name: spec for name, spec in config.items() if isinstance(spec, dict)}
    return [(build(spec), Path(name if len(formats) > 1 else "")) for name, spec in formats.items()]
