"""The tutorials' code, run as it stands in an empty folder.

What begins with ``nas`` runs in this process, where it takes a second instead of six.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import Nas

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


@pytest.mark.parametrize("pages", [("from-text", "many-workers"), ("from-a-checkpoint",)], ids=" ".join)
def test_a_tutorial_can_be_followed(nas: Nas, pages: tuple[str, ...]) -> None:
    for page in pages:
        code = re.findall(r"^```(bash|python)\n(.*?)^```", (TUTORIALS / f"{page}.md").read_text(), re.M | re.S)
        assert code
        for language, block in code:
            if language == "python":
                exec(block, {})  # the page is ours
            elif block.startswith("nas "):
                for command in block.replace("\\\n", "").splitlines():
                    outcome = nas(*shlex.split(command)[1:])
                    assert outcome.code == 0, f"{page}: {command}\n{outcome.err}"
            else:
                subprocess.run(["bash", "-ec", block], check=True)
    found = list(Path("runs/search").glob("*/trials.csv"))
    assert found
    for trials in found:
        assert pd.read_csv(trials)["vector"].is_unique, trials
