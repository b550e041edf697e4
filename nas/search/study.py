"""The search itself: an Optuna study that asks for vectors and is told their metrics.

It gets a function from vector to loss and knows nothing of supernets or GPUs. Any number of workers, processes of one
machine or of many, can call `search` for the same study: they share its budget, and no vector counts twice.

Optuna numbers trials in order. Of two workers with the same vector, or with the last evaluation of the budget, the one
with the higher number gives way: its trial is set FAIL. While a worker evaluates, Optuna's heartbeat shows the others
that it lives. When the beats stop, the trial is set FAIL, and its vector is proposed next. So whatever kills a worker
costs at most the evaluation that it was at.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Literal

import optuna
import pandas as pd
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages._heartbeat import get_heartbeat_thread  # Study.optimize cannot be told of trials that others ended
from optuna.trial import FrozenTrial, TrialState

from nas import console
from nas.errors import UserError
from nas.metrics import COLUMNS, LOSS, OPTIONAL_COLUMNS, Metrics
from nas.search.pareto import knee, on_front
from nas.search.problem import EVERYTHING, Budget, Problem
from nas.search.sampler import COUNTED, PROMISED, WHY_CONVERGED, DistinctSampler, has_converged
from nas.search.storage import Storage
from nas.space import Vector, format_vector

_POLL_S = 0.5  # between looks at what the others still evaluate


def search(
    problem: Problem,
    loss: Callable[[Vector], float],
    make_sampler: Callable[..., optuna.samplers.BaseSampler],
    budget: Budget,
    seed: int,
    storage: Storage,
    *,
    running: Literal["fail", "wait", "ignore"] = "fail",
    known: Sequence[Vector] = (),
    proposed: Sequence[Vector] = (),
    metadata: Mapping[str, str] | None = None,
    noise: Callable[[Vector], Metrics] = lambda _: {},
) -> pd.DataFrame:
    """Evaluates vectors until the budget or the space is used up; goes on with what ``storage`` holds.

    ``known`` vectors, whose loss is known from an earlier search, come first and are no part of the budget; then come
    the space's reference vectors, ``proposed`` ones, and what the sampler that ``make_sampler`` makes from a ``seed``
    proposes. No vector is evaluated that breaks a limit. A budget in seconds is time in which any worker was at work.
    ``metadata`` is what else all workers must have in common, ``noise`` what is to be told of a loss beside it. Returns
    when all other workers are finished too, with all evaluated vectors in the order of their trials: `COLUMNS` and what
    is known of `OPTIONAL_COLUMNS`. Its attribute ``stopped`` says why an automatic budget ended.

    ``running`` says what becomes of trials that run already. ``fail``: no other worker lives, so they are those of a
    killed one, and are made again. ``wait``: until each is finished, or its heartbeat has stopped, since a killed
    process may have had this one's place. ``ignore``: other workers see to them.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what goes wrong is in our own sentences
    known = list(filter(problem.keeps_limits, dict.fromkeys(known)))
    everything = problem.vectors() if budget == EVERYTHING else ()
    early = filter(problem.keeps_limits, [*problem.space.reference_vectors().values(), *proposed])
    first = list(dict.fromkeys([*known, *early, *everything]))
    evaluations = len(known) + min(budget.evaluations or problem.size, problem.size - len(known))
    sampler = DistinctSampler(make_sampler, problem, seed, first, evaluations)
    with storage.in_reach():
        study = storage.open(problem.objectives, sampler, metadata or {})
        worker = _Worker(study, sampler, loss, noise, budget)
        if running == "fail":
            for trial in worker.trials(TrialState.RUNNING):
                with suppress(UpdateFinishedTrialError):  # it ended at this very moment
                    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        awaited = worker.running() if running == "wait" else set()
        if awaited:
            console.print(f"Waiting for {len(awaited)} evaluations of other workers, or for these to count as dead")
        while awaited & worker.running():
            time.sleep(_POLL_S)
        total = None if budget.auto else budget.seconds or evaluations
        with console.progress_bar("Evaluating vectors", total, worker.spent()) as bar:
            while worker.may_go_on(bar):
                worker.evaluate_next(bar)
        if not worker.finished():
            raise UserError("the budget ended before one vector was evaluated; raise it")
        frame = worker.frame()
        converged = budget.auto and worker.has_converged()
    frame["on_front"] = on_front(frame, problem.objectives)
    frame = frame[COLUMNS + [column for column in OPTIONAL_COLUMNS if column in frame]]
    frame.attrs["stopped"] = WHY_CONVERGED if converged else ""
    return frame


@dataclass
class _Worker:
    """Works on a study."""

    study: optuna.Study
    sampler: DistinctSampler
    loss: Callable[[Vector], float]
    noise: Callable[[Vector], Metrics]
    budget: Budget  # of all workers together
    _seen: set[int] = field(default_factory=set)
    _told: tuple[float, str] = (-math.inf, "")  # when, and the note

    @cached_property
    def _begun(self) -> float:
        """When this worker would have begun if it had done all finished work, by its own clock."""
        seconds, until = 0.0, datetime.min  # in which at least one trial ran
        for start, end in sorted((trial.datetime_start, trial.datetime_complete) for trial in self.finished().values()):
            assert start is not None and end is not None, "a finished trial has both times"
            seconds += max(0.0, (end - max(start, until)).total_seconds())
            until = max(until, end)
        return time.monotonic() - seconds

    def finished(self) -> dict[Vector, FrozenTrial]:
        """The trials with metrics by vector, in the order of their numbers."""
        return self.sampler.vectors_of(self.trials(TrialState.COMPLETE))

    def spent(self) -> float:
        """Evaluations that all workers have finished, or seconds, whichever is limited."""
        return len(self.finished()) if self.budget.seconds is None else time.monotonic() - self._begun

    def may_go_on(self, bar: console.Bar) -> bool:
        """Whether there is something left to evaluate; waits while what others evaluate may decide that."""
        while True:
            running, finished = self.running(), self.finished()
            in_time = self.budget.seconds is None or self.spent() < self.budget.seconds
            in_time &= not (self.budget.auto and self.has_converged())
            if in_time and len(finished) + len(running) < self.sampler.evaluations:
                return True
            if not running:
                return False
            bar(self.spent(), self.so_far())
            time.sleep(_POLL_S)

    def has_converged(self) -> bool:
        """Whether the finished trials promised little for a while."""
        return has_converged([trial.system_attrs.get(PROMISED) for trial in self.finished().values()])

    def evaluate_next(self, bar: console.Bar) -> None:
        """Evaluates one vector, unless another worker turns out to have it."""
        trial = self.study.ask()
        with (
            get_heartbeat_thread(trial._trial_id, self.study._storage),
            suppress(UpdateFinishedTrialError),  # the others took this worker for dead, and ended its trial
        ):
            vector = tuple(trial.suggest_categorical(name, ways) for name, ways in self.sampler.choices.items())
            taken, proposing = self.sampler.before(trial.number, self.trials(*COUNTED))
            if vector in taken or len(taken) + proposing >= self.sampler.evaluations:
                self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
                return
            name, loss = format_vector(vector), self.loss(vector)
            if not math.isfinite(loss):
                fix = "train another one with a lower train.learning_rate"
                raise UserError(f"the loss of {name} is {loss}: the supernet has diverged; {fix}")
            metrics = {"vector": name, **self.sampler.problem.costs(vector), LOSS: loss, **self.noise(vector)}
            for key, value in metrics.items():
                trial.set_user_attr(key, value)
            values = [float(metrics[objective]) for objective in self.sampler.problem.objectives.names]
            self.study.tell(trial, values, skip_if_finished=True)
            bar(self.spent(), self.so_far())

    def so_far(self) -> str:
        """What the finished trials show, for the progress bar: looked at no more than once a second."""
        if time.monotonic() < self._told[0] + 1:
            return self._told[1]
        frame, objectives = self.frame(), self.sampler.problem.objectives
        if frame.empty:  # others took this worker for dead
            return ""
        front = frame[on_front(frame, objectives)]
        loss = front[LOSS].iloc[knee(front, objectives)]
        note = f"{len(front)} of {len(frame)} on the front, loss {loss:.4f} at its knee"
        self._told = time.monotonic(), note
        return note

    def frame(self) -> pd.DataFrame:
        """The metrics of the finished trials."""
        return pd.DataFrame([trial.user_attrs for trial in self.finished().values()])

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def running(self) -> set[int]:
        """The numbers of the trials that run, after those were failed whose heartbeat has stopped."""
        optuna.storages.fail_stale_trials(self.study)
        running = {trial.number: trial for trial in self.trials(TrialState.RUNNING)}
        # A worker that was killed before its first heartbeat would never count as dead, so each gets one from us.
        for number in running.keys() - self._seen:
            with get_heartbeat_thread(running[number]._trial_id, self.study._storage):
                self._seen.add(number)
        return set(running)
