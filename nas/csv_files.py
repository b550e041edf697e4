"""CSV tables read back."""

import math
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


def require(path: Path, frame: pd.DataFrame, good: "pd.Series[bool]", rule: str) -> None:
    """Refuses a table for its first row that is not good.

    Raises:
        UserError: There is one; the sentence has its line in the file, and the rule that it breaks.
    """
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
