"""How the rows of one training step are shared out: over the processes, and over the microbatches of each."""

from dataclasses import dataclass

from nas.distributed import RANK, SIZE
from nas.errors import UserError


@dataclass(frozen=True)
class Microbatch:
    """The ``index``-th of ``count`` equal shares of a step's rows."""

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
                f"{self.count // SIZE} microbatches; change train.batch or train.accumulate"
            )
        return slice(self.index * size, (self.index + 1) * size)


def own_microbatches(accumulate: int) -> list[Microbatch]:
    """The microbatches that this process computes, one after the other."""
    return [Microbatch(RANK * accumulate + number, SIZE * accumulate) for number in range(accumulate)]
