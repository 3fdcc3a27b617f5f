"""What the README and the docstrings promise: commands that parse, equations that are there."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import forks
import pytest

HERE = Path(__file__).resolve().parent.parent
SCRIPTS = ["cmpl", "tg_distill", "mml", "motionfit", "jedi"]


def rows_of_pages():
    """(page, cells) of each row of the tables of commands in tests/claims."""
    for page in sorted((HERE / "tests" / "claims").glob("*.md")):
        in_table = False
        for line in page.read_text().splitlines():
            in_table = line.startswith("|") and (in_table or line.startswith("| paper row | command |"))
            if in_table and not line.startswith(("| paper row |", "|---")):
                yield page.name, [cell.strip() for cell in line.strip("|").split(" | ")]


def test_each_row_of_a_page_has_a_command_and_a_key():
    rows = list(rows_of_pages())
    assert {page for page, _ in rows} == {f"{script}.md" for script in SCRIPTS}
    for page, cells in rows:
        assert len(cells) == 3 and re.fullmatch("`.+`", cells[1]) and cells[2], (page, cells)


def commands():
    """Command lines of the README, of the pages of ablations and of the scripts' docstrings."""
    texts = [(HERE / "README.md").read_text(), *(cells[1].strip("`") for _, cells in rows_of_pages())]
    texts += [importlib.import_module(name).__doc__ for name in SCRIPTS]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    pattern = r"^(?:    )?((?:RANKS_2_RUNS=\d+ )?(?:python|torchrun) .*)"
    return sorted({m[1].split(" # ")[0].strip() for line in lines if (m := re.match(pattern, line))})


def test_the_readme_is_short():
    lines = (HERE / "README.md").read_text().splitlines()
    assert len(lines) <= 220 and next(i for i, line in enumerate(lines) if "python cmpl.py" in line) < 25


def test_there_are_commands():
    assert len(commands()) > 8


@pytest.mark.parametrize("command", commands())
def test_command_parses(command):
    words = shlex.split(command)
    script = next((w for w in words if w.endswith(".py") and "/" not in w), None)
    if script:
        assert (HERE / script).exists()
        importlib.import_module(script[:-3]).parse_args(words[words.index(script) + 1 :])
    elif "pytest" in words:
        assert words[words.index("pytest") - 2 :][:2] == ["python", "-m"]
    else:  # a module or a tool of ours: what it says of itself must know the words used
        first = words.index("-m") if "-m" in words else 1
        start = words.index("-m") + 2 if "-m" in words else 2
        said = help_of(*words[first:start])
        if said.split("\n\n")[0].endswith(" ..."):  # it has subcommands
            said = help_of(*words[first:start], words[start])
        assert all(word in said for word in words[start:] if word.startswith("--"))


@cache
def help_of(*words):
    done = subprocess.run([sys.executable, *words, "--help"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ci_runs_the_commands_of_the_readme():
    readme, ci = (HERE / "README.md").read_text(), (HERE / ".ci" / "run").read_text()
    assert "\npython -m pytest -q\n" in readme and "\npython -m pytest -q\n" in ci


@pytest.mark.parametrize("script", SCRIPTS)
def test_equations_are_in_the_papers_order(script):
    """Reading only the lines with "Eq." tells the method; each promised difference D has its line."""
    source = (HERE / f"{script}.py").read_text()
    method = source[source.index("# ---") :]
    first = [int(n) for n in re.findall(r'"""Eq\. (\d+)', method)]
    assert first == sorted(first)
    promised = {int(n) for n in re.findall(r"^D(\d+) ", source, re.M)}
    kept = {int(n) for line in method.splitlines() for n in re.findall(r"\bD(\d+)\b", line)}
    flags = {int(n) for n in re.findall(r'help=".*\bD(\d+)', source)}
    assert promised == set(range(1, len(promised) + 1)) and promised <= kept | flags


@pytest.mark.parametrize("path", sorted((HERE / "common").glob("*.py")), ids=lambda p: p.name)
def test_common_knows_no_arguments_and_no_script(path):
    source = path.read_text()
    assert not re.search(r"import (cmpl|tg_distill|jedi|mml|motionfit)\b", source)
    if path.name not in ("datasets.py", "evaluate.py", "flags.py", "flow.py"):  # these have commands
        assert "argparse" not in source


def test_importing_a_script_does_nothing(tmp_path):
    code = f"import {', '.join(SCRIPTS)}, torch\nassert not torch.distributed.is_initialized()"
    (tmp_path / "imports.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = forks.start([sys.executable, tmp_path / "imports.py"], HERE, environment)
    assert done.communicate() == ("", "") and done.returncode == 0
