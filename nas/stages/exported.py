"""Exported models as the beginning of other stages: where they lie, and which run wrote them."""

from pathlib import Path

from nas.errors import UserError
from nas.export import Exporter
from nas.run import FinishedRun, is_run


def open_checkpoint(reference: str, exporter: Exporter) -> tuple[Path, dict[str, FinishedRun]]:
    """An exported model's directory, and as parent the run that wrote it if it still lies there, its files verified.

    Args:
        reference: The directory, or one with a single exported model inside.
        exporter: The format.

    Raises:
        UserError: There is none or more than one, a file is missing or was changed, or its run is unfinished.
    """
    folder = Path(reference)
    found = [folder / exporter.config] if (folder / exporter.config).is_file() else []
    found = found or sorted(folder.glob(f"*/{exporter.config}"))
    if not found:
        raise UserError(
            f"checkpoint {folder} does not exist or has no {exporter.config}; give a directory that 'nas export' or "
            "'nas finetune' wrote"
        )
    source = found[0].parent
    if len(found) > 1:
        raise UserError(f"checkpoint {folder} holds {len(found)} models; give one of them, such as {source}")
    files = (exporter.config, exporter.weights, "tokenizer.json")
    if is_run(source.parent):
        writer = FinishedRun(source.parent)
        for name in files:
            writer.artifact(f"{source.name}/{name}")
        return source, {"checkpoint": writer}
    if missing := [name for name in files if not (source / name).is_file()]:
        raise UserError(f"{source} has no {missing[0]}; export it again")
    return source, {}
