"""How long a search may go on."""

import re
from dataclasses import dataclass

from nas.errors import UserError


@dataclass(frozen=True)
class Budget:
    """How long a search may go on: so many evaluations, or so many seconds; None is no limit."""

    evaluations: int | None = None
    seconds: float | None = None

    @property
    def is_everything(self) -> bool:
        """Whether every vector is to be evaluated."""
        return self.evaluations is None and self.seconds is None


def parse_budget(text: str) -> Budget:
    """``200`` is evaluations; ``90s``, ``30m`` and ``2h`` are durations; ``all`` is every vector of the space.

    Raises:
        UserError: It is neither, or zero.
    """
    if text == "all":
        return Budget()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])|(\d+)", text.strip())
    if match:
        if match[3] and int(match[3]) > 0:
            return Budget(int(match[3]), None)
        if match[2] and float(match[1]) > 0:
            return Budget(None, float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]])
    raise UserError(
        f"budget is '{text}'; give a number of evaluations (200) or a duration (90s, 30m, 2h) above zero, or all"
    )
