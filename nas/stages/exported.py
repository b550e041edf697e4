"""Exported models as the beginning of other stages: where they lie, and which run wrote them."""

from pathlib import Path

from nas.errors import UserError
from nas.run import FinishedRun, is_run


def resolve_checkpoint(folder: Path) -> Path:
    """An exported directory, or the only one inside ``folder``.

    Raises:
        UserError: There is none, or more than one.
    """
    if not folder.is_dir():
        raise UserError(
            f"checkpoint {folder} does not exist; give a directory that 'nas export' or 'nas finetune' wrote"
        )
    if (folder / "config.json").is_file():
        return folder
    inside = sorted(file.parent for file in folder.glob("*/config.json"))
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise UserError(f"{folder} holds {len(inside)} models; give one of them, such as {inside[0]}")
    raise UserError(f"{folder} has no config.json; give a directory that 'nas export' or 'nas finetune' wrote")


def writer_of(folder: Path) -> dict[str, FinishedRun]:
    """The run that wrote an exported model, if the model still lies there; its files are verified.

    Raises:
        UserError: The run is unfinished, or a file was changed since.
    """
    if not is_run(folder.parent):
        return {}
    writer = FinishedRun(folder.parent)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        writer.artifact(f"{folder.name}/{name}")
    return {"checkpoint": writer}
