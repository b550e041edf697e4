"""Programmatic dependent launch (PDL): a kernel's programs start while those of the kernel before are at their end.

They wait until all that the kernels before have written is there, and only then read or write what others do. That
saves the time between two kernels, and what a program takes until it can begin.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MOST_ROWS = 128  # of a decode step that uses PDL, as its GEMMs are Triton's


@triton.jit
def wait_for_dependencies(PDL: tl.constexpr):
    """Until the kernels before are done."""
    if PDL:
        gdc_wait()


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Once all of a kernel's programs have come here, the next kernel's start, as far as there is room for them."""
    if PDL:
        gdc_launch_dependents()


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a GPU is of the kind on which PDL and Triton's GEMMs were found to be faster."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) == (9, 0)


def pdl_options(x: Tensor) -> dict[str, Any]:
    """Arguments of a kernel that calls the above, from the rows of a step and their device."""
    pdl = len(x) <= MOST_ROWS and is_hopper(x.device)
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
