"""How the rows of one training step are shared out: over the processes, and over the passes of each."""

from dataclasses import dataclass

from nas.distributed import RANK, SIZE
from nas.errors import UserError


@dataclass(frozen=True)
class Microbatch:
    """The ``index``-th of ``count`` equal parts of a step's rows."""

    index: int = 0
    count: int = 1

    def of(self, rows: int) -> slice:
        """Its rows, of ``rows``.

        Raises:
            UserError: They cannot be shared out equally.
        """
        size, left = divmod(rows, self.count)
        if left or not size:
            raise UserError(
                f"the {rows} texts of a training step cannot be shared out equally over {SIZE} processes × "
                f"{self.count // SIZE} passes; change train.batch or train.accumulate"
            )
        return slice(self.index * size, (self.index + 1) * size)


def own_microbatches(passes: int) -> list[Microbatch]:
    """The parts that this process computes, one pass each."""
    return [Microbatch(RANK * passes + number, SIZE * passes) for number in range(passes)]
