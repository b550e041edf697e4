"""The samples of a measurement: in segments, on disk as they come, and which of them count.

Between any two segments a sentinel, always the same point, was timed: where it is off its own median by more than the
tolerance, a GPU's samples on both sides do not count.
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nas.config import MeasureConfig
from nas.errors import UserError
from nas.files import read_csv
from nas.latency.points import PARTS, Point

SAMPLES = "samples.csv"
_POINT = ["phase", "part", "groups", "batch", "length"]
SAMPLE_COLUMNS = ["segment", "sentinel_before_ms", "sentinel_after_ms", *_POINT, "ms"]


@dataclass(frozen=True)
class Segment:
    """Samples taken one after another, in milliseconds."""

    before: float  # the sentinel
    after: float  # the sentinel
    samples: dict[Point, float]  # infinite for a point that does not fit into memory


@dataclass
class Samples:
    """All samples of a measurement; with a path, written there as they come."""

    path: Path | None = None
    segments: list[Segment] = field(default_factory=list)

    @classmethod
    def at(cls, path: Path) -> "Samples":
        """Those that an interrupted measurement left at ``path``, or none."""
        complete = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0
        if not complete:
            path.unlink(missing_ok=True)
            return cls(path)
        os.truncate(path, complete)  # without a line that a kill or a full disk cut short
        frame, segments = read_csv(path, SAMPLE_COLUMNS), []
        try:
            if not (frame["part"].isin(PARTS) & (frame[[*SAMPLE_COLUMNS[1:3], "ms"]] > 0).all(axis=1)).all():
                raise ValueError("a part is unknown, or a time not positive")
            for _, rows in frame.groupby("segment"):
                before, after = rows[SAMPLE_COLUMNS[1:3]].to_numpy()[0].tolist()
                points = [Point.of_row(*row) for row in rows[_POINT].itertuples(index=False)]
                segments.append(Segment(before, after, dict(zip(points, rows["ms"].tolist(), strict=True))))
        except (ValueError, TypeError, UserError) as error:
            raise UserError(f"{path} is corrupt ({error}); remove it and measure again") from None
        return cls(path, segments)

    def add(self, segment: Segment) -> None:
        """Appends a segment, to the file too."""
        rows = [[len(self.segments), segment.before, segment.after, *p.row(), ms] for p, ms in segment.samples.items()]
        self.segments.append(segment)
        if self.path:
            frame, begins = pd.DataFrame(rows, columns=SAMPLE_COLUMNS), not self.path.is_file()
            try:
                frame.to_csv(self.path, mode="a", index=False, header=begins)
            except OSError as error:  # which does not say where
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def drifts(self) -> list[float]:
        """By which share each segment's sentinel was off its median over all, at the worse of both sides."""
        seen = np.array([(segment.before, segment.after) for segment in self.segments]).reshape(-1, 2)
        drifts: list[float] = np.abs(seen / (np.median(seen) if len(seen) else 1) - 1).max(axis=1).tolist()
        return drifts

    def by_point(self, tolerance: float = math.inf) -> dict[Point, list[float]]:
        """Samples of each point, without those of segments in which the sentinel drifted more than ``tolerance``."""
        samples: dict[Point, list[float]] = {}
        for segment, drift in zip(self.segments, self.drifts(), strict=True):
            for point, ms in segment.samples.items():
                kept = samples.setdefault(point, [])
                if not drift > tolerance or math.isinf(ms):
                    kept.append(ms)
        return samples

    def due(self, points: Iterable[Point], config: MeasureConfig, on_gpu: bool) -> list[Point]:
        """Points that need another sample.

        On a GPU those with too few steady samples or too wide a spread, until they have twice as many as there are
        rounds; on a CPU those without three of which the two quickest agree, until they have as many.
        """
        taken, steady = self.by_point(), self.by_point(config.drift)

        def is_due(point: Point) -> bool:
            times, good = sorted(taken.get(point, [])), steady.get(point, [])
            if math.inf in times or len(times) >= config.rounds * (2 if on_gpu else 1):
                return False
            if on_gpu:
                return len(good) < config.rounds or spread(good) > config.spread
            return len(times) < 3 or times[1] > (1 + config.spread) * times[0]

        return list(filter(is_due, points))

    def used(self, config: MeasureConfig, on_gpu: bool) -> dict[Point, list[float]]:
        """Each point's samples that count.

        On a GPU the steady ones, or all where drift has left few; on a CPU the two quickest, as other programs only
        ever make a sample longer.
        """
        taken, steady, few = self.by_point(), self.by_point(config.drift), config.rounds // 2
        if not on_gpu:
            return {point: sorted(times)[:2] for point, times in taken.items()}
        return {point: steady[point] if len(steady[point]) > few else times for point, times in taken.items()}

    def drift_report(self, config: MeasureConfig) -> dict[str, Any]:
        """The drift of the sentinel, for latency.json."""
        drifts, steady = self.drifts(), self.by_point(config.drift)
        beyond = [segment for segment, drift in zip(self.segments, drifts, strict=True) if drift > config.drift]
        return {
            "tolerance": config.drift,
            "worst": round(max(drifts, default=0.0), 5),
            "segments": len(drifts),
            "segments_beyond": len(beyond),
            "points_affected": len({point for segment in beyond for point in segment.samples}),
            "points_left_unsteady": sum(not times for times in steady.values()),
        }


def spread(times: Sequence[float]) -> float:
    """How far the 20th and 80th percentiles are apart, as a share of the median."""
    low, middle, high = np.percentile(times, [20, 50, 80])
    return float((high - low) / middle)
