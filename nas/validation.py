"""Checks a config's keys, and its numbers by the names of their fields: a name means the same in every command."""

import dataclasses
from typing import Any

from nas.errors import UserError

_POSITIVE = {
    "accumulate",
    "batch",
    "batches",
    "checkpoint_every",
    "clip_norm",
    "context",
    "contexts",
    "distillation_temperature",
    "drift",
    "energy_batches",
    "heartbeat_s",
    "learning_rate",
    "length",
    "log_every",
    "memory_gib",
    "new_tokens",
    "price_per_hour",
    "prompt",
    "prompts",
    "rounds",
    "segment",
    "spread",
    "steps",
    "validate_every",
    "validation_windows",
    "vectors_per_text",
    "workers",
}
_LIMITS = ("max_", "min_")  # so do the names of constraints begin, and they are positive
_NOT_NEGATIVE = {
    "check",
    "weight_decay",
    "vectors",
    "equal_total",
    "seeds",
    "grid_kg_per_kwh",
    "energy_s",
    "temperature",
}
_AT_LEAST_ONE = {"pue"}
_SHARES = {"warmup_share", "final_share", "largest_share", "smallest_share", "largest_first", "distillation_weight"}
_SHARES |= {"utilisation"}
_NAMED = {
    "precision": ("auto", "fp32", "bf16"),
    "parallel": ("ddp", "fsdp"),
    "dtype": ("auto", "fp32", "bf16"),
    "runtime": ("auto", "eager", "graph", "compiled"),
}


def validate(config: Any, prefix: str = "") -> None:
    """Checks a tree of config dataclasses.

    Raises:
        UserError: A number is out of range, or Hydra was told to add a key that there is not; the sentence names it.
    """
    fields = dataclasses.fields(config)
    if unknown := sorted(vars(config).keys() - {item.name for item in fields}):
        raise UserError(f"there is no key {prefix}{unknown[0]}; --help lists the keys")
    for item in fields:
        key, value = prefix + item.name, getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            validate(value, f"{key}.")
        elif (value is not None or key == "workload.batch") and (rule := _broken_rule(key, item.name, value)):
            shown = f"'{value}'" if isinstance(value, str) else value
            raise UserError(f"{key} is {shown}{rule}")


def _broken_rule(key: str, name: str, value: Any) -> str | None:
    """How the sentence about a value goes on, if it breaks a rule."""
    values = value if isinstance(value, list) else [value]
    if key == "workload.batch":
        counts = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return None if counts or value == "max" else " but must be a positive number of sequences, or max"
    if name == "check_at":
        pairs = all(len(pair) == 2 and min(pair) > 0 for pair in value)
        return None if pairs else "; give pairs of batch and context, such as [[64,1024],[96,1500]]"
    if name == "name":
        return None if value.strip("./ ") else ", which names no run directory; give another name="
    if name in _NAMED:
        return None if value in _NAMED[name] else f"; use {', '.join(_NAMED[name])}"
    if isinstance(value, str | dict):
        return None
    if (name in _POSITIVE or name.startswith(_LIMITS)) and not (values and all(number > 0 for number in values)):
        return " but must be positive"
    if name in _NOT_NEGATIVE and not all(number >= 0 for number in values):
        return " but must be 0 or more"
    if name in _AT_LEAST_ONE and not value >= 1:
        return " but must be 1 or more"
    if name in _SHARES and not 0 <= value <= 1:
        return " but must lie between 0 and 1"
    if name == "seed" and not 0 <= value < 2**32:
        return f" but must lie between 0 and {2**32 - 1}"
    return None
