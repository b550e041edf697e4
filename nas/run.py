"""The run directory: what a stage was asked to do, where it came from, what it wrote, and whether it finished.

    run.json        argv, resolved config, git commit, package versions, device, seeds, parents with their hashes
                    (their paths are relative to the run's own, so runs/ can be moved)
    metrics.jsonl   one JSON object a line, append-only
    (artifacts)     whatever the stage makes
    complete.json   written last: the hash of every artifact. Its absence means unfinished

A run directory knows nothing of what a stage does.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock

from nas import __version__, console, tracking
from nas.distributed import IS_MAIN
from nas.errors import AlreadyFinishedError, InUseError, UserError, without_passwords
from nas.files import append_json_lines, file_hash, read_json, write_json
from nas.hardware import cpu_name, nvml_facts

_PACKAGES = ("torch", "optuna", "numpy", "pandas", "hydra-core", "transformers", "tokenizers", "datasets", "moocore")
_RUN, _COMPLETE, _LOCK = "run.json", "complete.json", ".lock"


class FinishedRun:
    """A finished run that another stage builds on; it must be of ``stage``, unless that is None."""

    def __init__(self, path: Path, stage: str | None = None) -> None:
        if not is_run(path):
            raise UserError(f"{path} is not a run directory (it has no {_RUN}); give the directory of a finished run")
        self.path, self.info = path, read_json(path / _RUN)
        corrupt = f"{path} is corrupt: {_RUN} or {_COMPLETE} lacks a key; restore it or run its stage again"
        if not (own := self.info.get("stage")):
            raise UserError(corrupt)
        if stage not in (None, own):
            raise UserError(f"{path} was written by 'nas {own}'; give a run of 'nas {stage}'")
        if not (path / _COMPLETE).is_file():
            name = path.as_posix().rpartition(f"{own}/")[2]  # with the sweep that it is of
            raise UserError(f"{path} is unfinished; run its command again with name={name} to finish it")
        try:
            self.config: dict[str, Any] = dict(self.info["config"])
            self.parents: dict[str, dict[str, str]] = dict(self.info["parents"])
            self.artifacts: dict[str, str] = dict(read_json(path / _COMPLETE)["artifacts"])  # hashes by name
        except (KeyError, TypeError, ValueError):
            raise UserError(corrupt) from None

    def digest(self) -> str:
        """Hash over the completion mark, and so over every artifact."""
        return file_hash(self.path / _COMPLETE)

    def artifact(self, name: str) -> Path:
        """Path of an artifact, whose content must be what it was when the run finished."""
        path = self.path / name
        if not path.is_file():
            raise UserError(f"{path} is missing; run 'nas {self.info['stage']}' again under a new name")
        if file_hash(path) != self.artifacts.get(name):
            fix = f"restore it, or remove {self.path} and run 'nas {self.info['stage']}' again"
            raise UserError(f"{path} is corrupt: it changed after the run finished; {fix}")
        return path

    def parent(self, role: str) -> "FinishedRun":
        """The run that this one was built on, by its role; it must be what it was then."""
        recorded = self.parents[role]
        parent = FinishedRun(Path(os.path.normpath(self.path / recorded["path"])))
        if parent.digest() != recorded["hash"]:
            raise UserError(f"{parent.path} is not the {role} that {self.path} was made from; run that again")
        return parent


class Run:
    """The run that is being written. Use `start_run`."""

    def __init__(self, path: Path, tracker: tracking.Tracker | None = None) -> None:
        self.path, self._tracker = path, tracker

    def log(self, **values: object) -> None:
        """Appends one line to metrics.jsonl."""
        if IS_MAIN:
            append_json_lines(self.path / "metrics.jsonl", [values])
        if self._tracker:
            numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
            self._tracker.scalars(numbers, int(numbers.pop("step", 0)))

    def finish(self, scaffold: Path | None = None) -> None:
        """Writes the completion mark, and only then removes the ``scaffold``, such as a checkpoint."""
        if not IS_MAIN:
            return
        artifacts = {
            str(path.relative_to(self.path)): file_hash(path)
            for path in sorted(self.path.rglob("*"))
            if path.is_file() and path.name not in (_RUN, _COMPLETE) and path != scaffold
            if not any(folder.startswith(".") for folder in path.relative_to(self.path).parts)
        }
        write_json(self.path / _COMPLETE, {"finished": now(), "artifacts": artifacts})
        if scaffold:
            scaffold.unlink(missing_ok=True)
        if self._tracker:
            self._tracker.finish(self.path)


@contextmanager
def start_run(
    path: Path,
    stage: str,
    config: Mapping[str, Any],
    seeds: Mapping[str, int] = {},
    parents: Mapping[str, FinishedRun] = {},
    free: Collection[str] = (),
) -> Iterator[Run]:
    """Begins a run, or goes on with an unfinished one of the same name, parents and config, apart from ``free`` keys.

    Of several processes under torchrun the first one keeps the run; to the others it is write-protected.
    """
    if not IS_MAIN:
        yield Run(path)
        return
    path.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(path / _LOCK).acquire(blocking=False)
    except filelock.Timeout:
        raise InUseError(f"{path} is in use by another process; wait for it or give another name=") from None
    with lock:
        origins = {role: {"path": os.path.relpath(r.path, path), "hash": r.digest()} for role, r in parents.items()}
        if is_run(path):
            check_begun(path, stage, {key: value for key, value in config.items() if key not in free})
            if read_json(path / _RUN).get("parents") != origins:
                raise UserError(f"{path} was begun from other parent runs; give another name=")
            if (path / _COMPLETE).is_file():
                raise AlreadyFinishedError(f"{path} is already finished; give another name= or remove it")
        else:
            argv = list(map(without_passwords, sys.orig_argv))
            versions = {"gqa-nas": __version__, "python": platform.python_version()}
            versions |= {package: metadata.version(package) for package in _PACKAGES}
            device = {"cpu": cpu_name(), "gpu": nvml_facts() or None, "system": platform.platform()}
            info: dict[str, object] = {"stage": stage, "started": now(), "argv": argv, "config": config, "seeds": seeds}
            info |= {"parents": origins, "git": git_state(), "versions": versions, "device": device}
            write_json(path / _RUN, info)
        name = path.resolve().as_posix().rpartition(f"/{stage}/")[2]  # with the sweep that it is of
        with tracking.tracked(f"{stage}/{name}", config) as tracker:
            yield Run(path, tracker)


def now() -> str:
    """UTC in ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_state() -> dict[str, object] | None:
    """Commit of the checkout that the package runs from, or None for an installed wheel."""
    git = partial(subprocess.check_output, cwd=Path(__file__).resolve().parent, stderr=subprocess.DEVNULL, text=True)
    try:
        git(["git", "ls-files", "--error-unmatch", "run.py"])  # fails in a checkout of something else
        commit, changes = git(["git", "rev-parse", "HEAD"]), git(["git", "status", "--porcelain"])
        return {"commit": commit.strip(), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return None


def check_begun(path: Path, stage: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config that the run ``path`` was begun with, empty if there is no such run.

    Refuses a run of another stage, or with another value of a key that ``config`` has. That need not be all keys: so a
    mistake is found before expensive work.
    """
    if not is_run(path):
        return {}
    begun = read_json(path / _RUN)
    if begun.get("stage") != stage:
        raise UserError(f"{path} belongs to 'nas {begun.get('stage')}'; give another name=")
    recorded: dict[str, Any] = begun.get("config", {})
    given = json.loads(json.dumps(config, default=str))
    if changed := [line for key in given for line in _differences(recorded.get(key), given[key], key)]:
        what, fix = "; ".join(changed[:3]), "repeat the first command to resume it, or give another name="
        raise UserError(f"{path} was begun with another config ({what}); {fix}")
    return recorded


def _differences(before: Any, after: Any, key: str) -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        return [d for k in before | after for d in _differences(before.get(k), after.get(k), f"{key}.{k}")]
    return [] if before == after else [f"{key} was {before}, now {after}"]


def find_runs(runs_dir: Path, stage: str) -> Iterator[FinishedRun]:
    """Finished runs of a stage under ``runs_dir``, newest first; corrupt ones are passed over with a warning."""
    marks = (runs_dir / stage).glob(f"**/{_COMPLETE}")
    for mark in sorted(marks, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            yield FinishedRun(mark.parent, stage)
        except UserError as error:
            console.warn(f"Passing over {mark.parent}: {error}")


def find_or_make(path: Path, stage: str, make: Callable[[], object]) -> FinishedRun:
    """The finished run of ``stage`` at ``path``, made if it is not there, or awaited while another process makes it.

    The name of ``path`` is a hash of what decides the run: what is finished there is right, and ``make`` resumes an
    interrupted attempt.
    """
    while not (path / _COMPLETE).is_file():
        try:
            make()
        except AlreadyFinishedError:
            break
        except InUseError:
            console.print(f"Waiting for another process to finish {path}")
            with filelock.FileLock(path / _LOCK):
                pass
    return FinishedRun(path, stage)


def runs_in(folder: Path) -> list[Path]:
    """``folder`` if it is a run directory, and those below it, finished or not; a sweep's may be nested."""
    return sorted(file.parent for file in folder.rglob(_RUN))


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory, finished or not."""
    return (path / _RUN).is_file()


def origin() -> dict[str, str | None]:
    """Columns that say by what code, on what machine and when the numbers of a CSV were made."""
    import torch  # here, for the CLI starts without it

    git = git_state()
    commit = f"{git['commit']}{'-dirty' if git['dirty'] else ''}" if git else None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    versions = {"gqa_nas": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return {"device": device, **versions, "commit": commit, "date": now()[:10]}
