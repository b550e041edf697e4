"""What this machine calls itself: its processor, and what NVML says of its first GPU."""

import platform
import re
from pathlib import Path
from typing import Any

import pynvml


def cpu_name() -> str:
    """The processor's name, e.g. ``AMD EPYC``."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        return match[1].strip()
    return platform.processor() or platform.machine()


def nvml_facts(uuid: str | None = None) -> dict[str, Any]:
    """Name, driver, clocks (MHz) and power limit (W) of a GPU; whatever NVML does not answer is left out.

    Args:
        uuid: Which GPU, as PyTorch gives its UUID; None is NVML's first.
    """
    facts: dict[str, Any] = {}
    try:
        pynvml.nvmlInit()
        by_index = uuid is None
        handle = pynvml.nvmlDeviceGetHandleByIndex(0) if by_index else pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return facts
    questions = {
        "nvml_name": lambda: pynvml.nvmlDeviceGetName(handle),
        "driver": pynvml.nvmlSystemGetDriverVersion,
        "sm_clock_at_start_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_at_start_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "power_limit_watts": lambda: pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
    }
    for key, ask in questions.items():
        try:
            facts[key] = ask()
        except pynvml.NVMLError:
            continue
    pynvml.nvmlShutdown()
    return facts
