"""What the README and the docstrings promise, how long files may be, and which room may import which."""

import ast
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

# Lines that files may have together. A budget is raised only by deleting elsewhere.
BUDGETS = {
    "cmpl.py": 397, "tg_distill.py": 520, "mml.py": 526, "motionfit.py": 675, "jedi.py": 603,
    "common/*.py": 2650, "common/**/*.py": 5000, "tests/*.py": 8000, "README.md": 220,
}  # fmt: skip
LINES_OF_CMPL = 4000  # of this project, in all that `import cmpl` loads
# Today's lines, rounded up, of what is over its budget: limits to lower, until the dict is empty.
PRESENT = {
    "cmpl.py": 397, "tg_distill.py": 520, "mml.py": 526, "motionfit.py": 675, "jedi.py": 603,
    "common/*.py": 3540, "common/**/*.py": 7200, "tests/*.py": 11660, "import cmpl": 5700,
}  # fmt: skip

# {room: the rooms that its files may import}, see `room_of`.
ARROWS = {"script": {"common", "io"}, "tool": {"common", "io", "shared by tools"},
          "shared by tools": {"common", "io"}, "common": {"common", "io"}, "io": {"io"}}  # fmt: skip
# What common/io may import of the first room: errors, and the types of data.
DATA_TYPES = {"common.data.Videos", "common.data.Data", "common.modality.Recipe"}
# And by exception: what rebuilds the network of a model.pt, and TV-L1, a pure function.
EXCEPTIONS = {
    ("common/io/models.py", "common.backbones"), ("common/io/models.py", "common.modality.MODALITIES"),
    ("common/io/flow.py", "common.tvl1.SCHEME"),
    ("common/io/flow.py", "common.tvl1.SMALLEST"), ("common/io/flow.py", "common.tvl1.flow_of_pairs"),
}  # fmt: skip


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
    pattern = r"^(?:    )?((?:python|torchrun) .*)"
    return sorted({m[1].split(" # ")[0].strip() for line in lines if (m := re.match(pattern, line))})


def test_the_readme_begins_with_a_command():
    lines = (HERE / "README.md").read_text().splitlines()
    assert next(i for i, line in enumerate(lines) if "python cmpl.py" in line) < 25
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
        text = help_of(*words[first:start])
        if text.split("\n\n")[0].endswith(" ..."):  # it has subcommands
            text = help_of(*words[first:start], words[start])
        assert all(word in text for word in words[start:] if word.startswith("--"))


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


# Lines of `train` that every script has, to the character and in this order.
SKELETON = """
    if run.finished(identity):
        return
    torch.manual_seed(args.seed)
    start = run.resume(identity, **parts)
        if batches is None:  # between two steps
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.track(step, optimizer.param_groups[0]["lr"], loss=loss, **terms)
        if run.due(step + 1, epoch):
            run.save(step + 1, identity, **parts)
    if run.stopped:
        return
"""
EPOCHS = "    total, every = (optim.steps_of(epochs, epoch) for epochs in (args.epochs, args.eval_every))\n"
LOOP = (
    r"    for step, batches in run\.steps\(\w+, start, total, args\.seed, .+\):\n        if batches is None:"
)
MAIN = """
@record
def main():
    args = parse_args()
    with Run("{script}", args.out, vars(args), free_flags(args, TEST)) as run:
        train(args, run)
"""
RULERS = {"jedi": "stages 1 and 2"}  # the third section, where it is not the data


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_share_their_skeleton(script):
    source = (HERE / f"{script}.py").read_text()
    train = source[source.index("\ndef train(") :]
    train = train[: train.index("\n\n\n")]
    if script == "jedi":  # whose epochs take a fraction of a second
        train = train.replace("run.due(step + 1, total):  # an epoch is short", "run.due(step + 1, epoch):")
    lines = iter(train.splitlines())
    for line in SKELETON.strip("\n").splitlines():
        assert line in lines, (
            f"{script}.py lacks, or has in another place, {line}"
        )  # what is before is used up
    assert train.count(EPOCHS) == 1 and len(re.findall(LOOP, train)) == 1
    numbers = re.findall(r"^    # (\d)\. ", train, re.M)
    assert [int(n) for n in numbers] == [*range(1, len(numbers) + 1)] and len(numbers) >= 4
    assert MAIN.format(script=script) in source or script in ("mml", "motionfit", "jedi")  # these have stages
    assert source.endswith('\n\n\nif __name__ == "__main__":\n    main()\n')
    rulers = [line.strip("# -") for line in source.splitlines() if line.startswith("# ------")]
    assert rulers[:3] == ["the method", "networks", RULERS.get(script, "data")] and "training" in rulers
    head = source[source.index("sys.path.insert") :].splitlines()[0]
    assert head == "sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH leaves it out"


def lines_of(paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


@pytest.mark.parametrize("files", BUDGETS)
def test_line_budgets(files):
    assert 0 < lines_of(HERE.glob(files)) <= max(BUDGETS[files], PRESENT.get(files, 0))


def room_of(module):
    """The room of a module of this project, or None for a module of another one."""
    top, *names = module.split(".")
    if top in SCRIPTS:
        return "script"
    if top != "common":
        return None
    if names[:1] == ["tools"]:
        return "shared by tools" if names[1:2] == ["shared"] else "tool"
    return "io" if names[:1] == ["io"] else "common"


def imports_of(path):
    """Full names of what a file imports, also inside functions: modules, and names of modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = [*(HERE / f"{script}.py" for script in SCRIPTS), *sorted((HERE / "common").rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HERE)))
def test_imports_follow_the_arrows(path):
    """script -> common -> common/io, tool -> any of common; nothing imports a script or a tool."""
    file = str(path.relative_to(HERE))
    room = room_of(file.removesuffix(".py").replace("/", "."))
    for name in imports_of(path):
        is_allowed = room_of(name) in ARROWS[room] | {None} or (
            room == "io" and (name in DATA_TYPES or name.startswith("common.errors."))
        )
        assert is_allowed or (file, name) in EXCEPTIONS, f"{file} imports {name}"
        assert name != "argparse" or room != "common" or path.stem == "flags", f"{file} has a command line"


def test_import_of_cmpl_is_light(tmp_path):
    (tmp_path / "names.py").write_text("import sys, cmpl\nprint(*sys.modules)")
    process = forks.start(
        [sys.executable, tmp_path / "names.py"], HERE, os.environ | {"PYTHONPATH": str(HERE)}
    )
    names = [name for name in process.communicate()[0].split() if room_of(name)]
    paths = [HERE / f"{name.replace('.', '/')}.py" for name in names]
    assert "cmpl" in names and not {"common.tvl1", "common.io.flow"} & set(names)
    assert lines_of(path for path in paths if path.exists()) <= max(
        LINES_OF_CMPL, PRESENT.get("import cmpl", 0)
    )


def test_importing_a_script_does_nothing(tmp_path):
    code = f"import {', '.join(SCRIPTS)}, torch\nassert not torch.distributed.is_initialized()"
    (tmp_path / "imports.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = forks.start([sys.executable, tmp_path / "imports.py"], HERE, environment)
    assert done.communicate() == ("", "") and done.returncode == 0
