"""The names of this machine's processor and GPU, and what NVML reports of the GPU."""

import platform
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pynvml

# Bits of NVML's clocks event reasons, once called throttle reasons. Not 0x1: a GPU that idles is not held back.
_THROTTLE_REASONS = {
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clock",
}


def cpu_name() -> str:
    """The processor's name, e.g. ``AMD EPYC``."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        return match[1].strip()
    return platform.processor() or platform.machine()


def _throttle_reasons(gpu: Any) -> list[str]:
    try:
        bits = pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
    except (pynvml.NVMLError, AttributeError):  # a binding or driver from before NVML renamed them
        bits = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)
    return [name for bit, name in _THROTTLE_REASONS.items() if bits & bit]


_QUERIES: dict[str, Callable[[Any], Any]] = {
    "nvml_name": lambda gpu: pynvml.nvmlDeviceGetName(gpu),
    "driver": lambda _: pynvml.nvmlSystemGetDriverVersion(),
    "power_limit_watts": lambda gpu: pynvml.nvmlDeviceGetPowerManagementLimit(gpu) / 1e3,
    "ecc": lambda gpu: bool(pynvml.nvmlDeviceGetEccMode(gpu)[0]),  # takes some of the bandwidth on cards with GDDR
    "sm_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
    "throttle_reasons": _throttle_reasons,
    "temperature_celsius": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
    # By all processes, and the driver.
    "memory_in_use_bytes": lambda gpu: int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used),
    # Of the whole card since its driver was loaded, from Volta on; updated every 20 to 100 ms.
    "energy_joules": lambda gpu: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3,
    # Of the whole card now; from Ampere on (A100 apart) NVML gives the mean of the last second.
    "power_watts": lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
}
_STATE = ("sm_clock_mhz", "memory_clock_mhz", "throttle_reasons", "temperature_celsius", "memory_in_use_bytes")


class Gpu:
    """A GPU by its UUID in PyTorch, or NVML's first. NVML may be absent, lack a sensor or fail: nothing raises here."""

    def __init__(self, uuid: str | None = None) -> None:
        self._handle: Any = None
        self._open = False
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            self._open = True
            if uuid is None:
                self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            else:
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle = None
        if self._open:
            self._open = False
            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def read(self, query: str) -> Any:
        """The answer to one of the queries, asked anew; None where NVML has none."""
        if self._handle is not None:
            with suppress(pynvml.NVMLError, AttributeError):  # AttributeError: the binding is older than the query
                return _QUERIES[query](self._handle)
        return None


def nvml_facts(uuid: str | None = None) -> dict[str, Any]:
    """Name, driver, power limit and whether ECC is on; whatever NVML does not answer is left out."""
    return _answers(uuid, ("nvml_name", "driver", "power_limit_watts", "ecc"))


def nvml_state(uuid: str | None = None) -> dict[str, Any]:
    """What changes while a GPU runs, to be recorded before and after; whatever NVML does not answer is left out."""
    return _answers(uuid, _STATE)


def _answers(uuid: str | None, queries: tuple[str, ...]) -> dict[str, Any]:
    with Gpu(uuid) as gpu:
        answers = {query: gpu.read(query) for query in queries}
    return {query: answer for query, answer in answers.items() if answer is not None}
