"""The search itself: an Optuna study that asks for vectors and is told their metrics.

It gets a function from vector to metrics and knows nothing of supernets or GPUs. Any number of workers, processes of
one machine or of many, can call `search` for the same study: they share its budget, and no vector counts twice.

A trial's number is the worker's ticket: Optuna gives each number once, in order. Of two workers with the same vector,
or with the last evaluation of the budget, the one with the higher number gives way: its trial is set FAIL. While a
worker evaluates, Optuna's heartbeat shows the others that it lives. When the beats stop, the trial is set FAIL, and its
vector is the first that is proposed next. So whatever kills a worker costs at most the evaluation that it was at.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Literal

import optuna
import pandas as pd
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import fail_stale_trials
from optuna.storages._heartbeat import get_heartbeat_thread  # Study.optimize cannot be told of trials that others ended
from optuna.trial import FrozenTrial, TrialState

from nas import console
from nas.budget import Budget
from nas.console import Bar
from nas.metrics import COLUMNS, OPTIONAL_COLUMNS
from nas.search.pareto import on_front
from nas.search.problem import Problem
from nas.search.sampler import LIVE, DistinctSampler
from nas.search.storage import Storage
from nas.space import Vector, format_vector

_POLL_S = 0.5  # between looks at what the others still evaluate


def search(
    problem: Problem,
    make_sampler: Callable[..., BaseSampler],
    budget: Budget,
    seed: int,
    storage: Storage,
    *,
    running: Literal["fail", "wait", "ignore"] = "fail",
    known: Sequence[Vector] = (),
    proposed: Sequence[Vector] = (),
    metadata: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Evaluates vectors until the budget or the space is used up; goes on with what ``storage`` holds.

    ``known`` vectors come first, then the space's reference vectors, then ``proposed`` ones, then what the sampler
    proposes; no vector is evaluated that breaks a limit. Returns when all other workers' evaluations are finished too.

    Args:
        problem: What is searched.
        make_sampler: Makes the Optuna sampler from a ``seed``.
        budget: When to stop; the reference vectors count. A duration is that in which any worker was at work.
        seed: Seeds the sampler.
        storage: Where the study lives.
        running: What becomes of trials that run already. ``fail``: no other worker lives, so they are half-done ones
            of a killed one, and are made again. ``wait``: until each is finished, or its heartbeat has stopped, since
            a killed process may have had this one's place. ``ignore``: other workers see to them.
        known: Vectors whose loss is known from an earlier search; they are no part of the budget.
        proposed: Vectors to evaluate early.
        metadata: What else all workers must have in common.

    Returns:
        All evaluated vectors in the order of their trials, with `COLUMNS` and what is known of `OPTIONAL_COLUMNS`.

    Raises:
        UserError: The study cannot be reached, read or written, or was begun with other metadata.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what goes wrong is in our own sentences
    space, limits = problem.space, problem.constraints
    known = list(filter(limits.keep, dict.fromkeys(known)))
    everything = limits.vectors() if budget.is_everything else ()
    first = filter(limits.keep, [*known, *space.reference_vectors().values(), *proposed, *everything])
    evaluations = len(known) + min(budget.evaluations or limits.size, limits.size - len(known))
    sampler = DistinctSampler(
        make_sampler, space, seed, list(dict.fromkeys(first)), limits.size, limits.permits, problem.known_objectives
    )
    with storage.in_reach():
        study = storage.open(problem.objectives, sampler, metadata or {})
        worker = _Worker(study, sampler, problem, evaluations, budget.seconds)
        if running == "fail":
            worker.fail_running()
        with console.progress_bar("Evaluating vectors", budget.seconds or evaluations, worker.spent()) as bar:
            if running == "wait":
                worker.wait_for_running()
            while worker.may_go_on(bar):
                worker.evaluate_next(bar)
        frame = pd.DataFrame([trial.user_attrs for trial in worker.finished().values()])
    frame["on_front"] = on_front(frame, problem.objectives)
    return frame[COLUMNS + [column for column in OPTIONAL_COLUMNS if column in frame]]


class _Worker:
    """Works on a study, whose sampler is ``sampler``; ``evaluations`` and ``seconds`` are for all workers together."""

    def __init__(
        self, study: optuna.Study, sampler: DistinctSampler, problem: Problem, evaluations: int, seconds: float | None
    ) -> None:
        self._study, self._sampler, self._problem = study, sampler, problem
        self._evaluations, self._seconds = evaluations, seconds
        self._begun = time.monotonic() - _seconds_worked(self.finished().values())
        self._seen: set[int] = set()

    def finished(self) -> dict[Vector, FrozenTrial]:
        """The trials with metrics by vector, in the order of their numbers."""
        return self._sampler.vectors_of(self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def spent(self) -> float:
        """Evaluations that all workers have finished, or seconds, whichever is limited."""
        return len(self.finished()) if self._seconds is None else time.monotonic() - self._begun

    def fail_running(self) -> None:
        """Sets aside the trials that a killed worker left half-done."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._fail(trial.number)

    def wait_for_running(self) -> None:
        """Returns when all trials that run at this moment have ended."""
        awaited = {trial.number for trial in self._live() if trial.state == TrialState.RUNNING}
        while awaited & {trial.number for trial in self._live() if trial.state == TrialState.RUNNING}:
            time.sleep(_POLL_S)

    def may_go_on(self, bar: Bar) -> bool:
        """Whether there is something left to evaluate; waits while what others evaluate may decide that."""
        while True:
            live = self._live()
            running = sum(trial.state == TrialState.RUNNING for trial in live)
            finished = len(self._sampler.vectors_of(trial for trial in live if trial.state == TrialState.COMPLETE))
            in_time = self._seconds is None or self.spent() < self._seconds
            if in_time and finished + running < self._evaluations:
                return True
            if not running:
                return False
            bar.update(self.spent())
            time.sleep(_POLL_S)

    def evaluate_next(self, bar: Bar) -> None:
        """Evaluates one vector, unless another worker turns out to have it."""
        trial = self._study.ask()
        with (
            get_heartbeat_thread(trial._trial_id, self._study._storage),
            suppress(UpdateFinishedTrialError),  # the others took this worker for dead, and ended its trial
        ):
            vector = tuple(trial.suggest_categorical(name, ways) for name, ways in self._sampler.choices.items())
            live = self._study.get_trials(deepcopy=False, states=LIVE)
            taken, proposing = self._sampler.before(trial.number, live)
            if vector in taken or len(taken) + proposing >= self._evaluations:
                self._fail(trial.number)
                return
            metrics = self._problem.evaluate(vector)
            for name, value in {"vector": format_vector(vector), **metrics}.items():
                trial.set_user_attr(name, value)
            values = [float(metrics[name]) for name in self._problem.objectives.names]
            self._study.tell(trial, values, skip_if_finished=True)
            bar.update(self.spent(), f"{format_vector(vector)} {metrics['loss_nats']:.4f}")

    def _live(self) -> list[FrozenTrial]:
        """The finished and the running trials, after those were failed whose heartbeat has stopped."""
        fail_stale_trials(self._study)
        live = self._study.get_trials(deepcopy=False, states=LIVE)
        for trial in live:
            if trial.state == TrialState.RUNNING and trial.number not in self._seen:
                self._seen.add(trial.number)  # a worker killed before its first beat would never count as dead:
                with get_heartbeat_thread(trial._trial_id, self._study._storage):
                    pass  # a single beat, made for it
        return live

    def _fail(self, number: int) -> None:
        with suppress(UpdateFinishedTrialError):  # it ended at this very moment
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _seconds_worked(trials: Iterable[FrozenTrial]) -> float:
    """Seconds in which at least one of some finished trials ran."""
    total, until = 0.0, datetime.min
    for start, end in sorted((trial.datetime_start, trial.datetime_complete) for trial in trials):
        assert start is not None and end is not None, "a finished trial has both times"
        total += max(0.0, (end - max(start, until)).total_seconds())
        until = max(until, end)
    return total
