"""What the scripts share."""

from pathlib import Path

import pytest
import shared


def test_rows_are_added_to_a_csv_without_touching_those_in_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    shared.add_rows(file, {"name": "a, b", "batch": 8, "ms": 0.1 + 0.2, "watts": None, "fits": True})
    first = file.read_text()
    file.write_text(first.replace("0.30000000000000004", "0.300000000000000044"))  # longer than a float
    shared.add_rows(file, {"batch": 9, "name": "c", "ms": 1.5, "driver": "5"}, {"name": "", "batch": 10})
    lines = file.read_text().splitlines()
    assert lines[0] == "name,batch,ms,watts,fits,driver"
    assert lines[1:] == ['"a, b",8,0.300000000000000044,,True,', "c,9,1.5,,,5", ",10,,,,"]


def test_a_page_is_filled_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\nlines\n<!-- /one -->\nb\n<!-- two -->\n<!-- /two -->\n")
    table = shared.markdown_table(["model", "ms"], [["x", 1], ["y", "2.5"]], "lr")
    for _ in range(2):  # the second time it is the same
        shared.fill_page(page, one=table, two="text")
        assert page.read_text() == (
            "a\n<!-- one -->\n| model | ms |\n| --- | ---: |\n| x | 1 |\n| y | 2.5 |\n<!-- /one -->\nb\n"
            "<!-- two -->\ntext\n<!-- /two -->\n"
        )


def test_a_command_of_the_product_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stopped:
        shared.finished("train", "none", "space=none", runs=tmp_path)
    assert stopped.value.code == 1
    run = tmp_path / "train" / "made"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"stage": "train", "config": {}, "parents": {}}')
    (run / "complete.json").write_text('{"artifacts": {}}')
    monkeypatch.setattr("subprocess.run", None)  # it is not called again
    assert shared.finished("train", "made", "space=tiny", runs=tmp_path).path == run
