"""What this machine calls itself: its processor, and what NVML says of one of its GPUs, for good and as it runs."""

import platform
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import pynvml

Answer = TypeVar("Answer")

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


class Gpu:
    """A GPU as NVML knows it. Each question is asked anew, and its answer is None where NVML has none.

    NVML may be absent, lack a sensor, or fail in the middle of a run: nothing here raises for that.

    Args:
        uuid: Which GPU, as PyTorch gives its UUID; None is NVML's first.
    """

    def __init__(self, uuid: str | None = None) -> None:
        self._handle: Any = None
        self._open = False
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            self._open = True
            by_index = uuid is None
            self._handle = (
                pynvml.nvmlDeviceGetHandleByIndex(0) if by_index else pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of NVML; afterwards there are no more answers."""
        self._handle = None
        if self._open:
            self._open = False
            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def name(self) -> str | None:
        """As NVML names it."""
        return self._ask(lambda gpu: pynvml.nvmlDeviceGetName(gpu))

    def driver(self) -> str | None:
        """The driver's version."""
        return self._ask(lambda _: pynvml.nvmlSystemGetDriverVersion())

    def power_limit_watts(self) -> float | None:
        """The power that the driver holds it to."""
        return self._ask(lambda gpu: pynvml.nvmlDeviceGetPowerManagementLimit(gpu) / 1e3)

    def sm_clock_mhz(self) -> int | None:
        """Clock of the multiprocessors now."""
        return self._ask(lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM))

    def memory_clock_mhz(self) -> int | None:
        """Clock of the memory now."""
        return self._ask(lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM))

    def throttle_reasons(self) -> list[str] | None:
        """What holds the clocks back now; empty where nothing does."""
        bits = self._ask(lambda gpu: pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu))
        if bits is None:  # a binding or driver from before NVML renamed them
            bits = self._ask(lambda gpu: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))
        return None if bits is None else [name for bit, name in _THROTTLE_REASONS.items() if bits & bit]

    def ecc(self) -> bool | None:
        """Whether the memory corrects errors, which takes some of its bandwidth on cards with GDDR."""
        return self._ask(lambda gpu: bool(pynvml.nvmlDeviceGetEccMode(gpu)[0]))

    def temperature_celsius(self) -> int | None:
        """Temperature of the chip now."""
        return self._ask(lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU))

    def memory_in_use_bytes(self) -> int | None:
        """Memory that all processes and the driver hold now."""
        return self._ask(lambda gpu: int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used))

    def energy_joules(self) -> float | None:
        """Energy of the whole card since its driver was loaded, from Volta on; updated every 20 to 100 ms."""
        return self._ask(lambda gpu: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3)

    def power_watts(self) -> float | None:
        """Power of the whole card now; from Ampere on (A100 apart) NVML gives the mean of the last second."""
        return self._ask(lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3)

    def _ask(self, question: Callable[[Any], Answer]) -> Answer | None:
        if self._handle is None:
            return None
        try:
            return question(self._handle)
        except (pynvml.NVMLError, AttributeError):  # AttributeError: the binding is older than the question
            return None


def nvml_facts(uuid: str | None = None) -> dict[str, Any]:
    """Name, driver, power limit and whether ECC is on; whatever NVML does not answer is left out.

    Args:
        uuid: Which GPU, as PyTorch gives its UUID; None is NVML's first.
    """
    with Gpu(uuid) as gpu:
        return _known(
            nvml_name=gpu.name(),
            driver=gpu.driver(),
            power_limit_watts=gpu.power_limit_watts(),
            ecc=gpu.ecc(),
        )


def nvml_state(uuid: str | None = None) -> dict[str, Any]:
    """What changes while a GPU runs, to be recorded before and after; whatever NVML does not answer is left out.

    Args:
        uuid: Which GPU, as PyTorch gives its UUID; None is NVML's first.
    """
    with Gpu(uuid) as gpu:
        return _known(
            sm_clock_mhz=gpu.sm_clock_mhz(),
            memory_clock_mhz=gpu.memory_clock_mhz(),
            throttle_reasons=gpu.throttle_reasons(),
            temperature_celsius=gpu.temperature_celsius(),
            memory_in_use_bytes=gpu.memory_in_use_bytes(),
        )


def _known(**answers: Any) -> dict[str, Any]:
    return {key: answer for key, answer in answers.items() if answer is not None}
