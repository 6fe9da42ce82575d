#!/usr/bin/env python
"""Render docs/results.md and the README's results from the committed result files in results/.

Nothing in those pages is typed by hand: `--check` fails where they differ from what the files say.
"""

import argparse
import sys
from pathlib import Path

from globalkd.experiments.matrix import load_table
from globalkd.experiments.tables import read_results, render_markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
PAGE = ROOT / "docs/results.md"
README = ROOT / "README.md"
README_TABLES = ["digits_main"]
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
MAX_SEEDS = 10
INTRODUCTION = """\
# Results

Rendered by `make results` from the result files in `results/`: one for each run, with its
configuration, overrides, seed, command, commit, machine and metrics. `make reproduce TABLE=name`
runs a table again, or for the first time; `results/tables/` has what can be run, also what has no
result yet because it needs data or hardware that was not at hand.
"""


def tables_with_results():
    """Every table that has a result, restricted to the seeds that were run."""
    for path in sorted((RESULTS / "tables").glob("*.yaml")):
        table = load_table(path, MAX_SEEDS)
        results = read_results(RESULTS / table.data)
        seeds = {
            seed for row in table.rows for seed, run in row.runs.items() if run.name in results
        }
        if seeds:
            yield load_table(path, max(seeds)), results


def render_page():
    """The text of docs/results.md."""
    parts = [INTRODUCTION]
    for table, results in tables_with_results():
        parts.append(render_markdown(table, results).replace("### ", "## ", 1))
        parts.append(f"`make reproduce TABLE={table.name}`\n")
    return "\n".join(parts)


def render_readme():
    """The README with its results section made anew."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    tables = [render_markdown(t, r) for t, r in tables_with_results() if t.name in README_TABLES]
    return f"{before}{BEGIN}\n{''.join(tables)}{END}{after}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if they differ")
    args = parser.parse_args()
    pages = {PAGE: render_page(), README: render_readme()}
    different = [p for p, text in pages.items() if not p.is_file() or p.read_text() != text]
    if args.check and different:
        names = ", ".join(str(path.relative_to(ROOT)) for path in different)
        sys.exit(f"{names}: not what results/ says; run `make results`.")
    for path in different:
        path.write_text(pages[path])


if __name__ == "__main__":
    main()
