"""Seeded batches: every batch is a function of the seed and the step number, so a resumed run sees the same ones.

A text that is shorter than a window is a UserError.
"""

import numpy as np
import torch
from torch import Tensor

from nas.data.tokens import Tokens
from nas.errors import UserError


def training_batch(tokens: Tokens, seed: int, step: int, rows: int, length: int, own: slice = slice(None)) -> Tensor:
    """Of the ``rows`` random windows of a step those that are this process's ``own``: ids (rows, length + 1).

    Inputs are all but the last column, targets all but the first.
    """
    windows = _windows(tokens, length, "training")
    starts = np.random.default_rng([seed, step]).integers(0, len(windows), size=rows)[own]
    return torch.from_numpy(windows[starts].astype(np.int64))


def validation_windows(tokens: Tokens, windows: int, length: int) -> Tensor:
    """Fixed windows spread evenly over ``tokens``, without overlap where there is room: ids (windows, length + 1)."""
    every = _windows(tokens, length, "validation")
    starts = np.linspace(0, len(every) - 1, min(windows, max(1, (len(tokens) - 1) // length))).astype(np.int64)
    return torch.from_numpy(every[starts].astype(np.int64))


def _windows(tokens: Tokens, length: int, kind: str) -> Tokens:
    """A view of all windows (starts, length + 1)."""
    if len(tokens) < length + 1:
        raise UserError(f"the {kind} text has {len(tokens)} tokens but a window takes {length + 1}; give more text")
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
