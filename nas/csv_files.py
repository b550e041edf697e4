"""CSV tables: written so that they never look finished when they are not, and checked when they are read back."""

import math
from functools import partial
from pathlib import Path

import pandas as pd

from nas.errors import UserError
from nas.files import write_atomically


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Writes the table without its index, atomically."""
    write_atomically(path, partial(frame.to_csv, index=False))


def read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    """Reads a CSV that must have at least ``columns``; a UserError if it is missing, no CSV, or lacks one."""
    try:
        frame = pd.read_csv(path, dtype={"vector": str})  # "4" is a vector of one layer
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the stage that writes it") from None
    except ValueError as error:  # as pandas' parser errors are
        raise UserError(f"{path} is not a valid CSV ({' '.join(str(error).split())}); restore it") from None
    if missing := [column for column in columns if column not in frame.columns]:
        raise UserError(f"{path} lacks the column {', '.join(missing)}; restore it or run its stage again")
    return frame


def require(path: Path, frame: pd.DataFrame, good: "pd.Series[bool]", rule: str) -> None:
    """Refuses a table for its first row that is not good, with the row's line in the file."""
    if not good.all():
        raise UserError(f"{path} is corrupt (row {frame.index[~good][0] + 2}: {rule}); restore it or measure again")


def positive_numbers(frame: pd.DataFrame, columns: list[str]) -> "pd.Series[bool]":
    """Which rows have positive and finite numbers in all of the columns."""
    numbers = frame[columns].apply(pd.to_numeric, errors="coerce")
    good: pd.Series[bool] = ((numbers > 0) & (numbers < math.inf)).all(axis=1)
    return good


def counts(frame: pd.DataFrame, columns: list[str]) -> "pd.Series[bool]":
    """Which rows have integers, none of them negative, in all of the columns."""
    numbers = frame[columns].apply(pd.to_numeric, errors="coerce")
    good: pd.Series[bool] = ((numbers >= 0) & (numbers % 1 == 0)).all(axis=1)
    return good
