"""Make the measured rows of the pages again: python tests/claims/run.py cmpl --row FixMatch

A page has tables with the header `| measured row | command | key | values of the seeds | mean |`. In a
command SEED stands for the seed and OUT for a folder of its own; `&&` joins commands that follow each other.
Each run is a line of results/PAGE.jsonl: the command, the seed, the versions it ran with, and what
result.json and table.csv of OUT say. A run that has its line is not made again. The last two columns are
written from these lines, and a test compares them.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
HEADER = "| measured row | command | key | values of the seeds | mean |"


def measured_rows(page):
    """(line number, [row, command, key, values, mean]) of each measured row."""
    rows, inside = [], False
    for number, line in enumerate((HERE / f"{page}.md").read_text().splitlines()):
        inside = line == HEADER or inside and line.startswith("|")
        if inside and line != HEADER and not line.startswith("|---"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            assert len(cells) == 5, f"{page}.md:{number + 1}: {len(cells)} cells, not 5"
            rows.append((number, cells))
    return rows


def results(page):
    """{(command, seed): the line of results/PAGE.jsonl}; a later line of the same run counts."""
    file = HERE / "results" / f"{page}.jsonl"
    lines = map(json.loads, file.read_text().splitlines() if file.exists() else ())
    return {(line["command"], line["seed"]): line for line in lines}


def cells_of(command, key, lines):
    """(values of the seeds, mean) of a row as the page has them, of the results of the page."""
    runs = sorted((seed, line["result"]) for (words, seed), line in lines.items() if words == command)
    if not runs:
        return "not run", "not run"
    values = [float(result[key]) for _, result in runs]
    return " ".join(f"{value:.1f}" for value in values), f"{sum(values) / len(values):.1f}"


def read_result(out):
    """{key: value} of result.json in the folder `out`, and of table.csv as `network/column`."""
    result = json.loads((out / "result.json").read_text())
    if (out / "table.csv").exists():
        for row in csv.DictReader((out / "table.csv").open()):
            network = row.pop(next(iter(row)))
            result |= {f"{network}/{column}": float(value) for column, value in row.items() if value}
    return result


def make(page, command, seed):
    """Run `command` with `seed`, and append its line to the results of the page."""
    name = hashlib.sha256(command.encode()).hexdigest()[:8]
    out = REPOSITORY / "runs" / "claims" / page / f"{name}_{seed}"
    words = command.replace("SEED", str(seed)).replace("OUT", shlex.quote(str(out)))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    began = time.time()
    with open(f"{out}.log" if out.parent.exists() else os.devnull, "a") as log:
        subprocess.run(words, shell=True, cwd=REPOSITORY, env=environment, check=True, stdout=log, stderr=log)
    config = json.loads((out / "config.json").read_text())
    line = {"command": command, "seed": seed, "seconds": round(time.time() - began),
            "versions": config["versions"], "result": read_result(out)}  # fmt: skip
    with (HERE / "results" / f"{page}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def write_page(page):
    """Write the last two columns of the page's tables from its results."""
    path, known = HERE / f"{page}.md", results(page)
    lines = path.read_text().splitlines()
    for number, (row, command, key, *_) in measured_rows(page):
        values, mean = cells_of(command.strip("`"), key.strip("`"), known)
        lines[number] = f"| {row} | {command} | {key} | {values} | {mean} |"
    path.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", help="a page of this folder, such as cmpl")
    parser.add_argument("--row", default="", help="only rows whose name has this in it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="the seeds to run")
    args = parser.parse_args()
    (REPOSITORY / "runs" / "claims" / args.page).mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for _, (row, command, *_) in measured_rows(args.page):
            command = command.strip("`")
            if args.row in row and (command, seed) not in results(args.page):
                print(f"{args.page}: {row}, seed {seed}", flush=True)
                make(args.page, command, seed)
                write_page(args.page)


if __name__ == "__main__":
    main()
