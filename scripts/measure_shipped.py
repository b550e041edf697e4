"""Measures the tables that ship, on the GPU at hand, and publishes them to latency_models/.

Each is a run of `nas measure` with a name of its own, so what was interrupted goes on, and what is finished is only
copied.

    python scripts/measure_shipped.py                          all tables
    python scripts/measure_shipped.py decilm-6b-compiled …     some of them
"""

import shlex
import subprocess
import sys
from pathlib import Path

from shared import argument_parser

_CONTEXTS = "measure.contexts=[256,1024,2048,4096]"
_PROMPTS = "measure.prompts=[512,1024,4096]"
_WORKLOAD = ("workload.context=2048", "workload.prompt=1024", "workload.dtype=bf16")
# After 64 and 128 rows other kernels follow, and after 132 sequences attention of one group splits some: a batch on
# either side, so that nothing is interpolated across.
_FEW = [1, 8, 16, 32, 64, 65, 96, 128, 129, 132, 133]
_DENSE = (f"measure.batches={sorted([*_FEW, 24, 48, 80, 112, *range(144, 369, 16)])}".replace(" ", ""),)
_COARSE = (f"measure.batches={[1, 2, 4, *_FEW[1:], *range(160, 257, 32), 288, 320]}".replace(" ", ""),)
_SPARSE = ("measure.batches=[1,8,32,64,128,192,320]",)
_DECILM = ("space=decilm-6b", "workload.batch=192", *_WORKLOAD, _CONTEXTS, _PROMPTS)
_LLAMA = ("space=llama-2-7b", "workload.batch=8", *_WORKLOAD, _CONTEXTS, _PROMPTS, "measure.energy_batches=[1,8]")
_CHECK = ("check=30", "measure.check_at=[[64,1536],[128,3000],[136,2500],[200,2500]]")
_LASTING = "measure.energy_batches=[1,8,32,64,80,112,128,192,256,320]"  # by which lasting steps are predicted, too
TABLES = {
    "decilm-6b-compiled": (*_DECILM, "workload.runtime=compiled", *_DENSE, *_CHECK, _LASTING),
    "decilm-6b-eager": (*_DECILM, "workload.runtime=eager", *_SPARSE, "check=8", "measure.energy_batches=[32,192]"),
    "llama-2-7b-compiled": (*_LLAMA, "workload.runtime=compiled", *_COARSE, "check=1"),
    "llama-2-7b-eager": (*_LLAMA, "workload.runtime=eager", *_SPARSE, "check=1"),
}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "tables", nargs="*", choices=[[], *TABLES], metavar="TABLE", help=f"some of {', '.join(TABLES)}"
    )
    commands = {
        name: [sys.executable, "-m", "nas", "measure", *TABLES[name], f"name=shipped-{name}"]
        for name in parser.parse_args().tables or TABLES
    }
    for name, words in commands.items():
        print(shlex.join(words), flush=True)
        if not Path(f"runs/measure/shipped-{name}/complete.json").is_file():
            subprocess.run(words, check=True)
    for words in commands.values():  # not before all are measured: each tells whether the checkout had changes
        subprocess.run([*words, "publish=latency_models"], check=True)


if __name__ == "__main__":
    main()
