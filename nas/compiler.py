"""What torch.compile needs of a machine: a compiler on the PATH."""

import os
import shutil

import torch

from nas.errors import UserError


def check_compiler(instead: str) -> None:
    """Refuses to compile where PyTorch would find no compiler: Triton takes one of C, for a CPU Inductor one of C++.

    Args:
        instead: The override that does without compiling.

    Raises:
        UserError: There is none.
    """
    variable, names = ("CC", ["gcc", "clang"]) if torch.cuda.is_available() else ("CXX", ["g++"])
    if variable in os.environ:
        names = [os.environ[variable]]
    if not any(map(shutil.which, names)):
        raise UserError(
            f"torch.compile needs a compiler but {' or '.join(names)} is not on the PATH; install one, set {variable} "
            f"to another, or give {instead}"
        )
