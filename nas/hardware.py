"""This machine: its processor's name, its compiler, and what NVML reports of its GPU."""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pynvml

from nas.errors import UserError


def cpu_name() -> str:
    """The processor's name, e.g. ``AMD EPYC``."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        return match[1].strip()
    return platform.processor() or platform.machine()


def check_compiler(instead: str) -> None:
    """Refuses to compile where PyTorch would find no compiler; ``instead`` is the override that does without.

    Triton takes one of C, for a CPU Inductor one of C++.
    """
    import torch  # here, so that the name of a processor needs no PyTorch

    variable, names = ("CC", ["gcc", "clang"]) if torch.cuda.is_available() else ("CXX", ["g++"])
    names = [os.environ[variable]] if variable in os.environ else names
    if not any(map(shutil.which, names)):
        raise UserError(
            f"torch.compile needs a compiler but {' or '.join(names)} is not on the PATH; install one, set {variable} "
            f"to another, or give {instead}"
        )


def _throttle_reasons(gpu: Any) -> list[str]:
    """By NVML's bits from 0x2 on; 0x1 is left out, for a GPU that idles is not held back."""
    reasons = (
        "application clocks, software power cap, hardware slowdown, sync boost, software thermal slowdown, "
        "hardware thermal slowdown, hardware power brake, display clock"
    )
    bits = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)  # by its older name, which all drivers know
    return [name for bit, name in enumerate(reasons.split(", "), start=1) if bits >> bit & 1]


_Query = Callable[[Any], Any]  # of NVML's handle of a GPU
_FACTS: dict[str, _Query] = {
    "nvml_name": lambda gpu: pynvml.nvmlDeviceGetName(gpu),
    "driver": lambda _: pynvml.nvmlSystemGetDriverVersion(),
    "power_limit_watts": lambda gpu: pynvml.nvmlDeviceGetPowerManagementLimit(gpu) / 1e3,
    "ecc": lambda gpu: bool(pynvml.nvmlDeviceGetEccMode(gpu)[0]),  # takes some of the bandwidth on cards with GDDR
}
_STATE: dict[str, _Query] = {
    "sm_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
    "throttle_reasons": _throttle_reasons,
    "temperature_celsius": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
    "memory_in_use_bytes": lambda gpu: int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used),  # by all processes and the driver
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


def _answers(queries: Mapping[str, _Query], uuid: str | None = None) -> dict[str, Any]:
    """What NVML answers; what it does not is left out."""
    with open_gpu(uuid) as read:
        return {name: answer for name, query in queries.items() if (answer := read(query)) is not None}


nvml_facts = partial(_answers, _FACTS)
nvml_state = partial(_answers, _STATE)  # to be recorded before and after a GPU works
