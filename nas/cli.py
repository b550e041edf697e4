"""``nas <stage> [--budget N] [Hydra overrides]``: from argv, through Hydra, to a stage.

Exit codes: 0 done; 1 the user's input is wrong, in one sentence; 2 Hydra's usage errors.
"""

import errno
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from nas import __version__, console, shipped, tracking
from nas.config import STAGES, StageConfig, build, register, to_stage
from nas.distributed import IS_MAIN, SIZE, broadcast, process_group
from nas.errors import AlreadyFinishedError, UserError, causes, in_short, is_out_of_memory
from nas.overrides import to_hydra

USAGE = """nas <stage> [--budget N] [KEY=VALUE ...]

  nas train    space=tiny                          train a supernet
  nas train    init=DIR                            the same, from the weights of a Hugging Face checkpoint
  nas measure  space=tiny device=this              time the space's layers on this machine
  nas search   --budget 200 space=tiny             find the Pareto front (trains and measures first if need be)
  nas report   run=runs/search/NAME                report.html and figures of a search or a sweep
  nas export   run=runs/search/NAME select=all     write model directories
  nas finetune checkpoint=DIR                      go on training an exported model
  nas finetune run=runs/export/NAME                all models of an export, each on the same batches: a new ranking
  nas generate checkpoint=DIR prompt=TEXT          continue a prompt with one
  nas fidelity supernet=runs/train/NAME            train some vectors: does the supernet rank them rightly?

nas <stage> --help lists the stage's keys; -m sweeps; --cfg job shows the config.
torchrun --nproc-per-node 8 -m nas train … trains on many GPUs.
eval "$(nas -sc install=bash)" switches tab completion on."""

_MANY_PROCESSES = ("train", "finetune")
_INSIST_S = 5.0  # an interrupt that comes amid a library's import may be swallowed, so it comes again
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOWHERE = (errno.ENOENT, errno.ELOOP)  # a folder that cannot be made, or that went away
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
_LESS_MEMORY = {
    "train": "lower train.batch, train.length, train.validation_windows or init.calibration_tokens, or raise "
    "train.accumulate",
    "measure": "lower workload.batch, workload.context or measure.batches",
    "search": "lower workers, train.batch, train.length, train.validation_windows, init.calibration_tokens, "
    "workload.batch or measure.batches",
    "finetune": "lower train.batch, train.length or train.validation_windows, or raise train.accumulate",
    "generate": "lower batch or new_tokens",
    "fidelity": "lower validation_windows, or take a supernet that was trained with a smaller train.batch",
}  # of the other stages nothing but the model takes any


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
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] not in STAGES:
        console.warn(f"nas: there is no stage '{arguments[0]}'; use {', '.join(STAGES)}")
        return 1
    code = _hydra(arguments[0], arguments[1:])
    if SIZE > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without the interpreter's clean-up, in which gloo's threads may abort the process
    return code


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, _INSIST_S)
    raise KeyboardInterrupt


def _hydra(stage: str, words: list[str]) -> int:
    """Hands over to Hydra, and turns what the user can fix into one sentence and an exit code."""
    failed, home = False, os.getpid()

    def run(config: DictConfig) -> None:
        nonlocal failed
        try:
            _run_stage(stage, config)
        except BaseException as error:
            if any(isinstance(cause, KeyboardInterrupt) for cause in causes(error)):  # libraries may cover it up
                raise KeyboardInterrupt(f"the same command with name={config.name} finishes it") from None
            if isinstance(error, AlreadyFinishedError) and HydraConfig.get().mode == RunMode.MULTIRUN:
                console.warn(f"nas {stage}: {str(error).partition(';')[0]}: left as it is")
                return  # a sweep that is repeated goes on with what is left
            _explain(stage, error, config.runs_dir)
            if os.getpid() != home:  # a launcher sent this job elsewhere, and tells of its failure at home
                raise
            failed = True  # and the other runs of a sweep still run

    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra's own errors reach us
    argv = sys.argv
    try:
        sys.argv = ["nas", *to_hydra(stage, words)]
        hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name=stage)(run)()
        return int(failed)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return _explain(stage, error)
    finally:
        sys.argv = argv


def _explain(stage: str, error: BaseException, runs_dir: str = "runs") -> int:
    """Prints the sentence about an error that the user can fix and returns the exit code; raises any other again."""
    code = 1
    if isinstance(error, KeyboardInterrupt):
        sentence = f"interrupted; {error}"
    elif lacks := [*filter(is_out_of_memory, causes(error))]:  # first: readers take it for a fault of their file
        what = in_short(lacks[-1]).partition(". ")[0]
        fix = _LESS_MEMORY.get(stage, "end other programs that use it, or take a smaller space")
        sentence = f"memory ran out ({what}); {fix}, or use a machine with more"
    elif isinstance(error, UserError):
        sentence = str(error)
    elif isinstance(error, HydraException | OmegaConfBaseException):
        sentence, code = _of_hydra(stage, error)
    elif isinstance(error, OSError) and (
        error.errno in (*_FULL_DISK, *_NO_PLACE) or (error.filename and error.errno in _NOWHERE)
    ):
        what = f"{error.filename or f'into {runs_dir}'} ({error.strerror})"
        sentence = f"cannot use {what}; fix that path, or choose another runs_dir= or name="
        if error.errno in _FULL_DISK:
            sentence = f"cannot write {what}; free some space and run the same command again"
    else:
        raise error
    console.warn(f"nas {stage}: {sentence}")
    return code


def _of_hydra(stage: str, error: Exception) -> tuple[str, int]:
    """The sentence about a mistake that Hydra or OmegaConf found, and the exit code."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    first = str(cause).splitlines()[0]
    if isinstance(error, MissingConfigException):  # of a list of choices Hydra does not name the options
        group = (shipped("conf") / str(error.missing_cfg_file)).parent
        return f"{first.rstrip('.')}; use {', '.join(error.options or sorted(f.stem for f in group.glob('*.yaml')))}", 1
    if ambiguous := re.match("Ambiguous value for argument '(.*?)=(.*)'", first):
        key, text = ambiguous.groups()
        return f"{key}={text} is several values; quote a text with commas, '{key}=\"{text}\"', or sweep with -m", 2
    key = str(getattr(cause, "full_key", None) or "")
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        first = f"there is no key {key}"
    where = f"{key}: " if key and key not in first else ""
    return f"{where}{first}; nas {stage} --help lists the keys", 1 if isinstance(cause, ValidationError) else 2


def _run_stage(stage: str, config: DictConfig) -> None:
    path = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    if SIZE > 1 and stage not in _MANY_PROCESSES:
        raise UserError(f"nas {stage} is one process; use torchrun with nas {' and nas '.join(_MANY_PROCESSES)} only")
    try:
        with process_group():
            asked: StageConfig = to_stage(config)
            tracking.choose(build(asked.logger, _partial_=True) if asked.logger and IS_MAIN else None)
            importlib.import_module(f"nas.stages.{stage}").run(asked, broadcast(path))
    finally:
        with suppress(OSError):  # Hydra made the directory; do not leave it behind empty
            path.rmdir()


def _complete(arguments: list[str]) -> int:
    """Tab completion: the stage is ours, everything after it is Hydra's."""
    words = os.environ.get("COMP_LINE", "").split()
    stage = words[1] if len(words) > 1 else ""
    if arguments[1:2] == ["query=bash"]:
        if stage not in STAGES:
            print(" ".join(STAGES))
            return 0
        os.environ["COMP_LINE"] = os.environ["COMP_LINE"].replace(f" {stage}", "", 1)
    return _hydra(stage or "search", arguments)
