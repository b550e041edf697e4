"""``nas <stage> [--budget N] [Hydra overrides]``: from argv, through Hydra, to a stage.

Exit codes: 0 done; 1 the user's input is wrong, in one sentence; 2 Hydra's usage errors.
"""

import errno
import importlib
import itertools
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException, ValidationError

from nas import __version__, console
from nas.config import STAGES, register, to_stage
from nas.distributed import SIZE, broadcast, leave, process_group
from nas.errors import AlreadyFinishedError, UserError, causes
from nas.files import without_passwords
from nas.resources import shipped

_USAGE = """nas <stage> [--budget N] [KEY=VALUE ...]

  nas train    space=tiny                          train a supernet
  nas train    init=DIR                            the same, from the weights of a Hugging Face checkpoint
  nas measure  space=tiny device=this              time the space's layers on this machine
  nas search   --budget 200 space=tiny             find the Pareto front (trains and measures first if need be)
  nas report   run=runs/search/NAME                draw the figures of a search or of a sweep
  nas export   run=runs/search/NAME select=all     write model directories
  nas finetune checkpoint=DIR                      go on training an exported model
  nas generate checkpoint=DIR prompt=TEXT          continue a prompt with one
  nas fidelity supernet=runs/train/NAME            train some vectors: does the supernet rank them rightly?

nas <stage> --help lists the stage's keys; -m sweeps; --cfg job shows the config.
torchrun --nproc-per-node 8 -m nas train … trains on many GPUs.
eval "$(nas -sc install=bash)" switches tab completion on."""

_MANY_PROCESSES = ("train", "finetune")
_MULTIRUN = {"-m", "--multirun"}
_INSIST_S = 5.0
_PROMPT = "prompt"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # a batch system's kill is a Ctrl-C
        signal.signal(number, _interrupt)
    if arguments[:1] == ["--version"]:
        print(__version__)
        return 0
    if arguments[:1] == ["-sc"]:
        return _complete(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    if arguments[0] not in STAGES:
        console.warn(f"nas: there is no stage '{arguments[0]}'; use {', '.join(STAGES)}")
        return 1
    code = _guarded(arguments[0], [_quoted(word) for word in _expand_budget(arguments[1:])])
    return code if SIZE == 1 else leave(code)


def _interrupt(*_: object) -> None:
    """Ends a command, and insists a little later: an exception that comes amid a library's import may be swallowed."""
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, _INSIST_S)
    raise KeyboardInterrupt


def _guarded(stage: str, overrides: list[str]) -> int:
    """Runs a stage and turns what the user can fix into one sentence and an exit code."""
    try:
        return _hydra(stage, overrides)
    except KeyboardInterrupt as interrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        console.warn(f"nas {stage}: interrupted; {interrupt}")
        return 1
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        lines = str(cause).splitlines()
        if isinstance(error, MissingConfigException):
            options = itertools.takewhile(lambda line: line.startswith("\t"), lines[3:])
            console.warn(f"nas {stage}: {lines[0]}; use {', '.join(option.strip() for option in options)}")
            return 1
        key = str(getattr(cause, "full_key", None) or "")
        where = f"{key}: " if key and key not in lines[0] else ""
        console.warn(f"nas {stage}: {where}{lines[0]}; nas {stage} --help lists the keys")
        return 1 if isinstance(cause, ValidationError) else 2
    except (UserError, OSError) as error:  # of a job on another machine; Hydra could not make the run directory
        console.warn(f"nas {stage}: {_sentence(error)}")
        return 1
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1


def _hydra(stage: str, overrides: list[str]) -> int:
    """Hands over to Hydra; returns 1 if a run failed by the user's mistake (the others of a sweep still run)."""
    if _MULTIRUN & set(overrides) and any(without_passwords(word) != word for word in overrides):
        raise UserError(
            "a sweep's command line is written to multirun.yaml, and a password in it would be too; give it in "
            "PGPASSWORD or ~/.pgpass instead"
        )
    failed, home = False, os.getpid()

    def run(config: DictConfig) -> None:
        nonlocal failed
        try:
            _run_stage(config)
        except BaseException as error:
            if any(isinstance(cause, KeyboardInterrupt) for cause in causes(error)):  # libraries may cover it up
                raise KeyboardInterrupt(f"the same command with name={config.name} finishes it") from None
            if not isinstance(error, UserError | OSError):
                raise
            if isinstance(error, AlreadyFinishedError) and HydraConfig.get().mode == RunMode.MULTIRUN:
                console.warn(f"nas {stage}: {str(error).partition(';')[0]}: left as it is")
                return  # a sweep that is repeated goes on with what is left
            console.warn(f"nas {stage}: {_sentence(error, config.runs_dir)}")
            if os.getpid() != home:  # a launcher sent this job elsewhere, and tells of its failure at home
                raise
            failed = True

    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra's own errors reach _guarded
    argv = sys.argv
    sys.argv = ["nas", *_name_sweep_by_what_it_varies(overrides)]
    try:
        hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name=stage)(run)()
    finally:
        sys.argv = argv
    return int(failed)


def _sentence(error: Exception, runs_dir: str = "runs") -> str:
    if isinstance(error, OSError):
        what = f"{error.filename or f'into {runs_dir}'} ({error.strerror})"
        if error.errno in _FULL_DISK:
            return f"cannot write {what}; free some space and run the same command again"
        if error.errno in _NO_PLACE:
            return f"cannot use {what}; fix that path, or choose another runs_dir= or name="
        raise error
    return str(error)


def _run_stage(config: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    path = Path(os.path.relpath(hydra_config.runtime.output_dir))
    stage = hydra_config.job.config_name
    if SIZE > 1 and stage not in _MANY_PROCESSES:
        raise UserError(f"nas {stage} is one process; use torchrun with nas {' and nas '.join(_MANY_PROCESSES)} only")
    try:
        with process_group():
            importlib.import_module(f"nas.stages.{stage}").run(to_stage(config), broadcast(path))
    finally:
        with suppress(OSError):  # Hydra made the directory; do not leave it behind empty
            path.rmdir()


def _expand_budget(arguments: list[str]) -> list[str]:
    """``--budget 200`` and ``--budget=200`` are sugar for ``budget=200``."""
    expanded: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--budget":
            expanded.append(f"budget={next(words, '')}")
        else:
            expanded.append(word.removeprefix("--") if word.startswith("--budget=") else word)
    return expanded


def _quoted(word: str) -> str:
    """A prompt is text as it is, so it is quoted for Hydra, and so is a value that Hydra's language does not know.

    All other words are in that language: lists, choices to sweep over, names with quotes of their own.
    """
    key, equals, text = word.partition("=")
    if not equals or word.startswith("-") or (key != _PROMPT and _is_hydras(word)):
        return word
    literal = re.sub(r"(\\*)\$\{", r"\1\1\${", text)  # no interpolation, for OmegaConf
    quoted = f"{key}={QuotedString(literal, Quote.double).with_quotes()}"
    return quoted if key == _PROMPT or _is_hydras(quoted) else word


def _is_hydras(word: str) -> bool:
    with suppress(HydraException):
        OverridesParser.create().parse_override(word)
        return True
    return False


def _name_sweep_by_what_it_varies(arguments: list[str]) -> list[str]:
    """Keeps overrides that are the same in all runs of a sweep out of the names of their folders."""
    if not _MULTIRUN & set(arguments):
        return arguments
    words = [word for word in arguments if "=" in word and not word.startswith("-")]
    with suppress(HydraException):  # Hydra says what is wrong with an override
        overrides = OverridesParser.create().parse_overrides(words)
        fixed = [override.key_or_group for override in overrides if not override.is_sweep_override()]
        at = arguments.index(words[0]) if words else len(arguments)  # Hydra wants all overrides together
        exclude = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]"
        return [*arguments[:at], exclude, *arguments[at:]]
    return arguments


def _complete(arguments: list[str]) -> int:
    """Tab completion: the stage is ours, everything after it is Hydra's."""
    words = os.environ.get("COMP_LINE", "").split()
    if arguments[1:2] == ["query=bash"]:
        if len(words) < 2 or words[1] not in STAGES:
            print(" ".join(STAGES))
            return 0
        os.environ["COMP_LINE"] = os.environ["COMP_LINE"].replace(f" {words[1]}", "", 1)
    return _guarded(words[1] if len(words) > 1 else "search", arguments)
