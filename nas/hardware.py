"""This machine: its processor's name, its compiler, and what NVML reports of its GPU."""

import os
import platform
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import pynvml

from nas.errors import UserError

# By NVML's bits from 0x2 on; 0x1 is not here, for a GPU that idles is not held back.
_THROTTLE_REASONS = [
    "application clocks",
    "software power cap",
    "hardware slowdown",
    "sync boost",
    "software thermal slowdown",
    "hardware thermal slowdown",
    "hardware power brake",
    "display clock",
]


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
    bits = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)  # by its older name, which all drivers know
    return [name for bit, name in enumerate(_THROTTLE_REASONS, start=1) if bits >> bit & 1]


_Queries = dict[str, Callable[[Any], Any]]
_FACTS: _Queries = {
    "nvml_name": lambda gpu: pynvml.nvmlDeviceGetName(gpu),
    "driver": lambda _: pynvml.nvmlSystemGetDriverVersion(),
    "power_limit_watts": lambda gpu: pynvml.nvmlDeviceGetPowerManagementLimit(gpu) / 1e3,
    "ecc": lambda gpu: bool(pynvml.nvmlDeviceGetEccMode(gpu)[0]),  # takes some of the bandwidth on cards with GDDR
}
_STATE: _Queries = {
    "sm_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
    "throttle_reasons": _throttle_reasons,
    "temperature_celsius": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
    "memory_in_use_bytes": lambda gpu: int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used),  # by all processes and the driver
}
_SENSORS: _Queries = {  # of the whole card
    # Since its driver was loaded, from Volta on; updated every 20 to 100 ms.
    "energy_joules": lambda gpu: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3,
}
_QUERIES = _FACTS | _STATE | _SENSORS


class Gpu:
    """A GPU by its UUID in PyTorch, or NVML's first. NVML may be absent, lack a sensor or fail: nothing raises here."""

    _handle: Any = None

    def __init__(self, uuid: str | None = None) -> None:
        self._uuid = uuid

    def __enter__(self) -> Self:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            by_index, by_uuid = pynvml.nvmlDeviceGetHandleByIndex, pynvml.nvmlDeviceGetHandleByUUID
            self._handle = by_index(0) if self._uuid is None else by_uuid(f"GPU-{self._uuid}")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()

    def read(self, query: str) -> Any:
        """The answer to one of the queries, asked anew; None where NVML has none."""
        if self._handle is not None:
            with suppress(pynvml.NVMLError, AttributeError):  # AttributeError: the binding is older than the query
                return _QUERIES[query](self._handle)
        return None


def _answers(queries: _Queries, uuid: str | None = None) -> dict[str, Any]:
    """What NVML answers; what it does not is left out."""
    with Gpu(uuid) as gpu:
        return {query: answer for query in queries if (answer := gpu.read(query)) is not None}


nvml_facts = partial(_answers, _FACTS)
nvml_state = partial(_answers, _STATE)  # to be recorded before and after a GPU works
