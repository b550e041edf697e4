"""The samples of a measurement: in segments, on disk as they come, and which of them count.

Between any two segments a sentinel, always the same point, was timed: where it is off its own median by more than the
tolerance, the samples on both sides do not count.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from nas.config import MeasureConfig
from nas.csv_files import counts, positive_numbers, read_csv, require
from nas.errors import UserError
from nas.latency.points import PARTS, Point, point_of

SAMPLES = "samples.csv"
_POINT_COLUMNS = ["phase", "part", "groups", "batch", "length"]
SAMPLE_COLUMNS = ["segment", "sentinel_before_ms", "sentinel_after_ms", *_POINT_COLUMNS, "ms"]


@dataclass(frozen=True)
class Segment:
    """Samples taken one after another, and what the sentinel took before and after them."""

    before: float  # milliseconds of the sentinel
    after: float  # the same
    samples: dict[Point, float]  # milliseconds by point; infinite for one that does not fit into memory


@dataclass
class Samples:
    """All samples of a measurement; with a path, written there as they come."""

    path: Path | None = None
    segments: list[Segment] = field(default_factory=list)

    @classmethod
    def at(cls, path: Path) -> "Samples":
        """Those that an interrupted measurement left at ``path``, or none."""
        if not path.is_file():
            return cls(path)
        content = path.read_bytes()
        if not (end := content.rfind(b"\n") + 1):
            path.unlink()
            return cls(path)
        os.truncate(path, end)  # without a line that a kill or a full disk cut short
        frame = read_csv(path, SAMPLE_COLUMNS)
        good = positive_numbers(frame, SAMPLE_COLUMNS[1:3]) & counts(frame, ["segment", "batch", "length"])
        good &= frame["part"].isin(PARTS) & (pd.to_numeric(frame["ms"], errors="coerce") > 0)
        require(path, frame, good, "a part is unknown, or a number not positive")
        segments = []
        try:
            for _, rows in frame.groupby("segment"):
                points = [point_of(*row) for row in rows[_POINT_COLUMNS].itertuples(index=False)]
                first = rows.iloc[0]
                times = dict(zip(points, rows["ms"].astype(float), strict=True))
                segments.append(Segment(float(first.iloc[1]), float(first.iloc[2]), times))
        except (ValueError, TypeError, UserError) as error:
            raise UserError(f"{path} is corrupt ({error}); remove it and measure again") from None
        return cls(path, segments)

    def add(self, segment: Segment) -> None:
        """Appends a segment, to the file too."""
        rows = [[len(self.segments), segment.before, segment.after, *p.row(), ms] for p, ms in segment.samples.items()]
        self.segments.append(segment)
        if self.path:
            text = pd.DataFrame(rows, columns=SAMPLE_COLUMNS).to_csv(index=False, header=not self.path.is_file())
            try:
                with self.path.open("a", encoding="utf-8") as stream:
                    stream.write(text)
            except OSError as error:  # which does not say where
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def drifts(self) -> list[float]:
        """By which share each segment's sentinel was off its median over all, at the worse of both sides."""
        usual = median([ms for segment in self.segments for ms in (segment.before, segment.after)] or [math.nan])
        return [max(abs(ms / usual - 1) for ms in (segment.before, segment.after)) for segment in self.segments]

    def by_point(self, tolerance: float = math.inf) -> dict[Point, list[float]]:
        """Samples of each point, without those of segments in which the sentinel drifted more than ``tolerance``."""
        samples: dict[Point, list[float]] = {}
        for segment, drift in zip(self.segments, self.drifts(), strict=True):
            for point, ms in segment.samples.items():
                kept = samples.setdefault(point, [])
                if not drift > tolerance or math.isinf(ms):
                    kept.append(ms)
        return samples


def due_on_gpu(points: Iterable[Point], samples: Samples, config: MeasureConfig) -> list[Point]:
    """Points with too few steady samples or too wide a spread, until they have twice as many as there are rounds."""
    taken, good = samples.by_point(), samples.by_point(config.drift)

    def is_due(point: Point) -> bool:
        times, steady = taken.get(point, []), good.get(point, [])
        if math.inf in times or len(times) >= 2 * config.rounds:
            return False
        return len(steady) < config.rounds or spread(steady) > config.spread

    return list(filter(is_due, points))


def due_on_cpu(points: Iterable[Point], samples: Samples, config: MeasureConfig) -> list[Point]:
    """Points without three samples of which the two quickest agree, until they have as many as there are rounds."""
    taken = samples.by_point()

    def is_due(point: Point) -> bool:
        times = sorted(taken.get(point, []))
        if math.inf in times or len(times) >= config.rounds:
            return False
        return len(times) < 3 or times[1] > (1 + config.spread) * times[0]

    return list(filter(is_due, points))


def spread(times: Sequence[float]) -> float:
    """How far the 20th and 80th percentiles are apart, as a share of the median."""
    low, middle, high = np.percentile(times, [20, 50, 80])
    return float((high - low) / middle)


def used_on_gpu(samples: Samples, config: MeasureConfig) -> Iterator[tuple[Point, list[float]]]:
    """Each point's samples: the steady ones, or all where drift has left few."""
    good = samples.by_point(config.drift)
    for point, times in samples.by_point().items():
        yield point, good[point] if len(good[point]) > config.rounds // 2 else times


def used_on_cpu(samples: Samples) -> Iterator[tuple[Point, list[float]]]:
    """Each point's two quickest samples: other programs only ever make a sample longer."""
    for point, times in samples.by_point().items():
        yield point, sorted(times)[:2]


def drift_report(samples: Samples, config: MeasureConfig) -> dict[str, Any]:
    """The drift of the sentinel, for latency.json."""
    drifts = samples.drifts()
    affected = [segment for segment, drift in zip(samples.segments, drifts, strict=True) if drift > config.drift]
    redone = Counter(point for segment in affected for point in segment.samples)
    good = samples.by_point(config.drift)
    return {
        "tolerance": config.drift,
        "worst": round(max(drifts, default=0.0), 5),
        "segments": len(drifts),
        "segments_beyond": len(affected),
        "points_affected": len(redone),
        "points_left_unsteady": sum(not good[point] for point in redone),
    }
