"""CSV tables read back."""

from pathlib import Path

import pandas as pd

from nas.errors import UserError


def read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    """Reads a CSV that must have at least ``columns``.

    Raises:
        UserError: It is missing, no CSV, or lacks a column.
    """
    try:
        frame = pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the stage that writes it") from None
    except (ValueError, UnicodeDecodeError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path} is not a valid CSV ({' '.join(str(error).split())}); restore it") from None
    if missing := [column for column in columns if column not in frame.columns]:
        raise UserError(f"{path} lacks the column {', '.join(missing)}; restore it or run its stage again")
    return frame
