"""The measured numbers of the pages are those of the raw results."""

import difflib
import importlib
import shlex
import sys
from pathlib import Path

import pytest
import torch

CLAIMS = Path(__file__).resolve().parent / "claims"
sys.path.insert(0, str(CLAIMS))
import run  # noqa: E402

PAGES = sorted(path.stem for path in CLAIMS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_pages_say_what_the_results_say(page):
    known, rows = run.results(page), [cells for _, cells in run.measured_rows(page)]
    for row, command, key, *written in rows:
        assert tuple(written) == run.cells_of(command.strip("`"), key.strip("`"), known), row
    assert {command for command, _ in known} <= {cells[1].strip("`") for cells in rows}


@pytest.mark.parametrize("page", PAGES)
def test_measured_rows_are_commands_that_parse(page):
    for _, (_, line, *_) in run.measured_rows(page):
        assert "SEED" in line and "OUT" in line
        for command in line.strip("`").replace("SEED", "0").split(" && "):
            words = shlex.split(command)
            if words[1].endswith(".py"):
                importlib.import_module(words[1][:-3]).parse_args(words[2:])


def test_a_row_is_made_from_its_results(tmp_path, monkeypatch):
    page = (
        f"{run.HEADER}\n|---|---|---|---|---|\n| a | `x SEED` | `top1` | | |\n| b | `y SEED` | `top1` | | |\n"
    )
    (tmp_path / "page.md").write_text(page)
    (tmp_path / "results").mkdir()
    lines = ['{"command": "x SEED", "seed": 1, "result": {"top1": 30.04}}',
             '{"command": "x SEED", "seed": 0, "result": {"top1": 20.0}}']  # fmt: skip
    (tmp_path / "results" / "page.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(run, "HERE", tmp_path)
    run.write_page("page")
    a, b = (tmp_path / "page.md").read_text().splitlines()[2:]
    assert a == "| a | `x SEED` | `top1` | 20.0 30.0 | 25.0 |" and b.endswith("| not run | not run |")


def test_the_sixth_method_is_a_small_change_of_cmpl():
    """The example of a copied script: under 40 lines differ, and each pseudo-label has its weight."""
    paths = CLAIMS.parent.parent / "cmpl.py", CLAIMS / "sixth.py"
    ours, copy = (path.read_text().splitlines() for path in paths)
    changes = [line[:1] for line in difflib.ndiff(ours, copy)]
    assert 0 < changes.count("-") < 40 and 0 < changes.count("+") < 40
    sixth = importlib.import_module("sixth")
    y, weight = sixth.pseudo_label(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    assert y.tolist() == [0, 2] and weight.tolist() == pytest.approx([0.5, 0.8])
    assert sixth.parse_args([]).aux == "none"
