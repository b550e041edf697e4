"""Copies what `make demo` drew into docs/demo/, for the README: figures, the CSVs behind them, machine and date.

python scripts/update_readme_demo.py NAME      # the name that the demo printed, e.g. demo-20261123-120000
"""

import argparse
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(name: str) -> None:
    """Fills docs/demo/ from runs/search/NAME and runs/report/NAME."""
    target = ROOT / "docs" / "demo"
    target.mkdir(parents=True, exist_ok=True)
    search, report = ROOT / "runs" / "search" / name, ROOT / "runs" / "report" / name
    for file in [*search.glob("*.csv"), *report.glob("*.png")]:
        shutil.copy(file, target / file.name)
    info = json.loads((search / "run.json").read_text())
    facts = {key: info[key] for key in ("started", "git", "versions", "seeds")}
    facts["cpu"] = info["device"]["cpu"]
    facts |= {key: info["config"][key] for key in ("device", "workload", "latency", "budget")}
    (target / "provenance.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"Updated {target.relative_to(ROOT)} from {name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the search, as the demo printed it")
    main(parser.parse_args().name)
