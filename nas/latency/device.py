"""What is known of a device: the one we run on, or one that latency_models/ describes.

A device is named as NVML (or the CPU) names it, in lower case with dashes: ``nvidia-a10g``. Its folder in
latency_models/ holds device.json with what an estimate needs, and any measured tables.
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
    """A device and what is known of it."""

    slug: str  # name of its folder, e.g. ``nvidia-a10g``
    name: str  # as the device names itself
    is_gpu: bool  # whether PyTorch reaches it through CUDA
    memory_bytes: int  # usable memory
    bandwidth_bytes_per_s: float | None = None  # memory bandwidth by data sheet, or None if unknown
    flops: dict[str, float] = field(default_factory=dict)  # dense matrix rate by dtype name, by data sheet
    facts: dict[str, Any] = field(default_factory=dict)  # anything else worth recording: driver, power limit, source
    calibration: dict[str, Any] | None = None  # for estimates better than the data sheet: nas/latency/estimate.py

    @property
    def usable_bytes(self) -> int:
        """What the device leaves to PyTorch: CUDA takes some of a GPU for itself, other programs half of a machine."""
        return self.memory_bytes - _CUDA_CONTEXT if self.is_gpu else self.memory_bytes // 2

    def description(self) -> dict[str, Any]:
        """The contents of its device.json."""
        values = dataclasses.asdict(self)
        source = values.pop("facts").get("source", "as the device reports; data-sheet rates unknown")
        del values["slug"]
        if values["calibration"] is None:
            del values["calibration"]
        return values | {"source": source}


def device_folders(slug: str) -> list[Path]:
    """Where a device may be described: latency_models/ in the working directory, then what ships."""
    return [root / slug for root in _roots()]


def _roots() -> list[Path]:
    return list(dict.fromkeys((Path("latency_models").resolve(), shipped("latency_models").resolve())))


def this_device() -> Device:
    """The first GPU that PyTorch sees, else this machine's CPU."""
    import torch  # here, so that reading a named device needs no PyTorch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        name = properties.name
        return Device(_slug(name), name, True, properties.total_memory, facts=nvml_facts(str(properties.uuid)))
    name = cpu_name()
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count()
    facts = {"cores": cores, "threads": torch.get_num_threads()}
    return Device(_slug(f"cpu {name} {cores} cores"), name, False, psutil.virtual_memory().total, facts=facts)


def find_device(reference: str) -> Device:
    """``this``, or a device described in latency_models/."""
    if reference == "this":
        return this_device()
    files = [folder / DEVICE for folder in device_folders(reference) if (folder / DEVICE).is_file()]
    if not files:
        known = sorted({path.parent.name for root in _roots() for path in root.glob(f"*/{DEVICE}")})
        raise UserError(f"there is no device '{reference}'; use this, {', '.join(known)}")
    values = read_json(files[0])
    try:
        return Device(
            slug=reference,
            name=str(values["name"]),
            is_gpu=bool(values["is_gpu"]),
            memory_bytes=int(values["memory_bytes"]),
            bandwidth_bytes_per_s=values["bandwidth_bytes_per_s"] and float(values["bandwidth_bytes_per_s"]),
            flops={dtype: float(rate) for dtype, rate in values["flops"].items()},
            facts={"source": values["source"]},
            calibration=values.get("calibration"),
        )
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{files[0]} is corrupt ({reason}); restore it") from None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
