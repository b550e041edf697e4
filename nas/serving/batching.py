"""How a batch goes through a model: prompts in chunks, decode steps padded to numbers of rows that suit the GEMMs."""

import math

PREFILL_TOKENS = 4096  # per chunk: the activations of more would fill the memory
_FEW_ROWS = 64  # of a decode step; more are padded, at most to a multiple of this


def prefill_chunks(batch: int, prompt: int) -> list[int]:
    """Rows of each chunk in which a batch of prompts is prefilled: as many as `PREFILL_TOKENS` allow, at least one."""
    rows = min(batch, max(1, PREFILL_TOKENS // prompt))
    return [rows] * (batch // rows) + ([batch % rows] if batch % rows else [])


def padded_batches(batch: int, runtime: str) -> list[int]:
    """Numbers of rows to which a decode step may be padded, ascending: the batch, in a CUDA graph also multiples above.

    GEMMs of some numbers of rows take a fifth longer than those of more: `fastest_rows` finds them.
    """
    if runtime == "eager" or batch <= _FEW_ROWS:
        return [batch]
    most = math.ceil(batch / _FEW_ROWS) * _FEW_ROWS
    return sorted({batch, math.ceil(batch / 8) * 8, *range(math.ceil(batch / 16) * 16, most + 1, 16)})
