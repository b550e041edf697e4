"""This machine: its processor's name, its compiler, and what NVML reports of its GPU."""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pynvml

from nas.errors import UserError

if TYPE_CHECKING:
    from torch import nn  # here, so that the name of a processor needs no PyTorch


def cpu_name() -> str:
    """The processor's name, e.g. ``AMD EPYC``."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        return match[1].strip()
    return platform.processor() or platform.machine()


def compile_layers(layers: "Iterable[nn.Module]", instead: str, dynamic: bool | None = None) -> None:
    """Compiles layers one by one, for all of one shape share a graph.

    Refused where PyTorch would find no compiler; ``instead`` is the override that does without.
    """
    import torch

    # Triton takes one of C, for a CPU Inductor one of C++.
    variable, names = ("CC", ["gcc", "clang"]) if torch.cuda.is_available() else ("CXX", ["g++"])
    names = [os.environ[variable]] if variable in os.environ else names
    if not any(map(shutil.which, names)):
        fix = f"install one, set {variable} to another, or give {instead}"
        raise UserError(f"torch.compile needs a compiler but {' or '.join(names)} is not on the PATH; {fix}")
    torch._dynamo.config.recompile_limit = 64  # a graph for each number of K/V heads, and there can be more than 8
    for layer in layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=dynamic)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """PyTorch on so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_Query = Callable[[Any], Any]  # of NVML's handle of a GPU
_FACTS: dict[str, _Query] = {
    "nvml_name": lambda gpu: pynvml.nvmlDeviceGetName(gpu),
    "driver": lambda _: pynvml.nvmlSystemGetDriverVersion(),
    "power_limit_watts": lambda gpu: pynvml.nvmlDeviceGetPowerManagementLimit(gpu) / 1e3,
    "ecc": lambda gpu: bool(pynvml.nvmlDeviceGetEccMode(gpu)[0]),  # takes some of the bandwidth on cards with GDDR
}


def energy_joules(gpu: Any) -> float:
    """Energy of the whole card since its driver was loaded; from Volta on, updated every 20 to 100 ms."""
    return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) / 1e3


@contextmanager
def open_gpu(uuid: str | None) -> Iterator[Callable[[_Query], Any]]:
    """Gives a function that asks a query of the GPU with this UUID in PyTorch, or of NVML's first.

    The answer is None where NVML is absent, lacks the sensor or fails: nothing raises here.
    """
    gpu = None
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") if uuid else pynvml.nvmlDeviceGetHandleByIndex(0)

    def read(query: _Query) -> Any:
        with suppress(pynvml.NVMLError, AttributeError):  # AttributeError: the binding is older than the query
            return query(gpu) if gpu is not None else None

    try:
        yield read
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def nvml_facts(uuid: str | None = None) -> dict[str, Any]:
    """What NVML answers; what it does not is left out."""
    with open_gpu(uuid) as read:
        return {name: answer for name, query in _FACTS.items() if (answer := read(query)) is not None}
