"""What `nas measure` times: points, each a part of a model at a phase, batch and length, and the grid they make up."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from nas.config import MeasureConfig
from nas.latency.predictor import MAX, PHASES, Phase, Workload
from nas.serving.batching import prefill_chunks
from nas.space import SearchSpace, Vector, format_vector, parse_vector

EMBEDDING_AND_HEAD = ("embedding", "head")  # the look-up of the tokens; final norm and output head at the last position
PARTS = (*EMBEDDING_AND_HEAD, "layer", "whole")  # one layer, and an end-to-end model


@dataclass(frozen=True, order=True)
class Point:
    """What is timed at once."""

    phase: Phase
    part: str  # one of `PARTS`
    groups: Vector  # a layer's KV groups alone, an end-to-end model's vector, nothing for embedding and head
    batch: int  # rows
    length: int  # tokens of each row in the cache at a decode step, or of its prompt

    def row(self) -> list[Any]:
        """Plain values for a CSV."""
        return [self.phase, self.part, format_vector(self.groups) or "0", self.batch, self.length]

    @classmethod
    def of_row(cls, phase: Any, part: Any, groups: Any, batch: Any, length: Any) -> Self:
        """Reads back what `row` wrote."""
        vector = () if part in EMBEDDING_AND_HEAD else parse_vector(str(groups))
        return cls(phase, part, vector, int(batch), int(length))


@dataclass(frozen=True)
class Grid:
    """The batches, and the lengths of either phase, whose combinations are timed."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]

    def surrounds(self, batch: int, context: int) -> bool:
        """Whether a decode step lies between batches and contexts that are timed."""
        return self.batches[0] <= batch <= self.batches[-1] and self.contexts[0] <= context <= self.contexts[-1]

    def shapes(self, phase: Phase) -> Iterator[tuple[int, int]]:
        """Batch and length of every point. Of prompts that is at most one prefill chunk."""
        if phase == "decode":
            return itertools.product(self.batches, self.contexts)
        most = self.batches[-1]
        return ((rows, prompt) for prompt in self.prompts for rows in sorted({1, prefill_chunks(most, prompt)[0]}))

    def points(self, space: SearchSpace) -> list[Point]:
        """All parts at all shapes; of a decode step, embedding and head depend on the batch alone."""
        choices, points = sorted(set().union(*space.choices)), list[Point]()
        for phase in PHASES:
            shapes = list(self.shapes(phase))
            points += [Point(phase, "layer", (groups,), *shape) for shape in shapes for groups in choices]
            outside = shapes if phase == "prefill" else [(batch, 1) for batch in self.batches]
            points += [Point(phase, part, (), *shape) for shape in outside for part in EMBEDDING_AND_HEAD]
        return points


def grid_for(config: MeasureConfig, workload: Workload, batches: Sequence[int], limit: int) -> Grid:
    """The config's grid, with the workload's lengths and ``batches``; two values per axis, as interpolation needs.

    With `batch=max` these are the smallest and the largest batch. ``limit`` is the space's context.
    """

    def axis(given: Sequence[int] | None, own: Sequence[int], *shares: int) -> tuple[int, ...]:
        values = {*own, *(given if given is not None else (max(1, max(own) // share) for share in shares))}
        return tuple(sorted(values if len(values) > 1 else {*own, own[0] // 2 or min(2, limit)}))

    return Grid(
        axis(config.batches, batches, 2, *([] if workload.batch == MAX else [4])),
        axis(config.contexts, [workload.context], 2, 4),
        axis(config.prompts, [workload.prompt], 2),
    )


def check_shapes(
    config: MeasureConfig, grid: Grid, workload: Workload, batches: Sequence[int]
) -> list[tuple[Phase, int, int]]:
    """Where end-to-end models are timed: at the workload, and at `measure.check_at` or halfway between grid points."""
    batch = min(batches)  # with batch=max, only the smallest vectors have more
    steps, prompts = [(batch, workload.context)], [workload.prompt]
    if config.check_at is not None:
        steps += [(rows, context) for rows, context in config.check_at]
    else:
        context = _halfway(grid.contexts)
        steps += [(_halfway([rows for rows in grid.batches if rows <= batch]), context), (batch, context)]
        prompts.append(_halfway(grid.prompts))
    shapes: list[tuple[Phase, int, int]] = [("decode", *step) for step in steps]
    shapes += [("prefill", prefill_chunks(batch, prompt)[0], prompt) for prompt in prompts]
    return list(dict.fromkeys(shapes))


def _halfway(axis: Sequence[int]) -> int:
    """Between the two largest values."""
    return sum(axis[-2:]) // len(axis[-2:])
