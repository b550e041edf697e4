"""What is known of a device: the one we run on, or one whose folder in latency_models/ describes it.

Such a folder has device.json, with what an estimate needs, and any measured tables.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nas import shipped
from nas.errors import UserError
from nas.files import read_json
from nas.hardware import cpu_name, nvml_facts

DEVICE = "device.json"
_CUDA_CONTEXT = 3 * 2**28  # bytes: context, kernels' code and the driver's reserve, a little above what an H100 showed


@dataclass(frozen=True)
class Device:
    slug: str  # name of its folder: as the device names itself, in lower case with dashes, e.g. ``nvidia-a10g``
    name: str  # as the device names itself
    is_gpu: bool  # whether PyTorch reaches it through CUDA
    memory_bytes: int  # usable memory
    bandwidth_bytes_per_s: float | None = None  # memory bandwidth by data sheet, or None if unknown
    flops: dict[str, float] = field(default_factory=dict)  # dense matrix rate by dtype name, by data sheet
    source: str = "as the device reports; data-sheet rates unknown"  # of these numbers
    facts: dict[str, Any] = field(default_factory=dict)  # anything else worth recording: driver, power limit
    calibration: dict[str, Any] | None = None  # for estimates better than the data sheet: nas/latency/estimate.py

    @property
    def usable_bytes(self) -> int:
        """What the device leaves to PyTorch: CUDA takes some of a GPU for itself, other programs half of a machine."""
        return self.memory_bytes - _CUDA_CONTEXT if self.is_gpu else self.memory_bytes // 2

    def calibrated(self, dtype: str) -> dict[str, Any] | None:
        """The calibration, if it is of ``dtype`` too."""
        return self.calibration if self.calibration and dtype in self.calibration["dtypes"] else None

    def description(self) -> dict[str, Any]:
        """The contents of its device.json."""
        hidden = {"slug", "facts"} | (set() if self.calibration else {"calibration"})
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in hidden}


def device_folders(slug: str = "") -> list[Path]:
    """Where a device, or without one any, may be described: latency_models/ in the working directory, then shipped."""
    roots = dict.fromkeys((Path("latency_models").resolve(), shipped("latency_models").resolve()))
    return [root / slug for root in roots]


def this_device() -> Device:
    """The first GPU that PyTorch sees, else this machine's CPU."""
    import torch  # here, so that reading a named device needs no PyTorch

    if is_gpu := torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        name, label, memory_bytes, facts = gpu.name, gpu.name, gpu.total_memory, nvml_facts(str(gpu.uuid))
    else:
        cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count()
        name, memory_bytes = cpu_name(), psutil.virtual_memory().total
        label, facts = f"cpu {name} {cores} cores", {"cores": cores, "threads": torch.get_num_threads()}
    return Device(re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-"), name, is_gpu, memory_bytes, facts=facts)


def find_device(reference: str) -> Device:
    """``this``, or a device described in latency_models/."""
    if reference == "this":
        return this_device()
    files = [folder / DEVICE for folder in device_folders(reference) if (folder / DEVICE).is_file()]
    if not files:
        known = sorted({path.parent.name for root in device_folders() for path in root.glob(f"*/{DEVICE}")})
        raise UserError(f"there is no device '{reference}'; use this, {', '.join(known)}")
    try:
        device = Device(reference, **read_json(files[0]))
        numbers = [device.memory_bytes, device.bandwidth_bytes_per_s or 1, *device.flops.values()]
        if not all(isinstance(number, int | float) and number > 0 for number in numbers):
            raise ValueError("memory_bytes, bandwidth_bytes_per_s and flops must be positive numbers")
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{files[0]} is corrupt ({error}); restore it") from None
    return device
