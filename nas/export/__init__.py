"""Exported models. A format is one module here and one YAML in conf/export that names its class."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from nas.model import Decoder


class Exporter(Protocol):
    """A format of models on disk: a folder for each, with these two files and the model's tokenizer.json."""

    config: str  # by which a folder is recognised
    weights: str  # not there if the model was on the meta device
    of_served: bool  # whether `nas export` gives it the served shape, on the meta device, not the supernet's weights

    def write(self, model: Decoder, tokenizer: Path | None, folder: Path, card: Mapping[str, str]) -> None:
        """Writes ``model``, its ``tokenizer`` (a tokenizer.json) and a model card that states ``card``, by title."""

    def read(self, folder: Path, with_weights: bool = True) -> Decoder:
        """Reads a model back, running none of its code; without its weights it is on the meta device.

        A UserError tells that it is not a model of this format, or that it is corrupt.
        """
