"""Seeded batches: every batch is a function of the seed and the step number, so a resumed run sees the same ones."""

import numpy as np
import torch
from torch import Tensor

from nas.data.tokens import Tokens
from nas.errors import UserError


def training_batch(tokens: Tokens, seed: int, step: int, rows: int, length: int, own: slice = slice(None)) -> Tensor:
    """Random windows of ``tokens`` for one step.

    Args:
        tokens: The training text.
        seed: Which random windows.
        step: Number of the step.
        rows: Windows of the whole step.
        length: Tokens that a window predicts.
        own: Which of these windows to read, for one of several processes.

    Returns:
        Token ids (rows of ``own``, length + 1): inputs are all but the last column, targets all but the first.

    Raises:
        UserError: There are fewer than length + 1 tokens.
    """
    _check(tokens, length, "training")
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - length, size=rows)[own]
    return torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64))


def validation_windows(tokens: Tokens, windows: int, length: int) -> Tensor:
    """Fixed windows spread evenly over ``tokens``, without overlap where there is room.

    Returns:
        Token ids (windows, length + 1), as `training_batch`.

    Raises:
        UserError: There are fewer than length + 1 tokens.
    """
    _check(tokens, length, "validation")
    windows = min(windows, max(1, (len(tokens) - 1) // length))
    starts = np.linspace(0, len(tokens) - length - 1, windows).astype(np.int64)
    return torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64))


def _check(tokens: Tokens, length: int, kind: str) -> None:
    if len(tokens) < length + 1:
        raise UserError(f"the {kind} text has {len(tokens)} tokens but a window takes {length + 1}; give more text")
