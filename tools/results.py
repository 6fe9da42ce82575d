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
configuration, overrides, seed, command, commit, machine and metrics. A table is a file in
`results/tables/`, a matrix of configurations and seeds; all its students share a teacher and a
start, as students that begin with ImageNet weights do:

```bash
make reproduce TABLE=digits_modules SEEDS=3                          # one training after the other
make reproduce TABLE=digits_modules SEEDS=3 JOBS=2 ARGS="--threads 1"  # two at a time, on two cores
make reproduce TABLE=coco_main ARGS="--num-gpus 8"                   # $DETECTRON2_DATASETS
make reproduce TABLE=bccd_main ARGS="--data my/bccd"                 # a VOC folder
make compare                                                         # every method, two seeds
```

Finished runs are kept and interrupted ones resumed. Tables and result files are written to
`output/reproduce/`; with `ARGS="--results results"` the result files go where this page is made
from. How strongly each method pulls, and how its weights were chosen:
[methods.md](methods.md#how-strongly-each-one-pulls).
"""


def tables_with_results():
    """Tables with results of five rows or half of them, restricted to the seeds that were run."""
    for path in sorted((RESULTS / "tables").glob("*.yaml")):
        table = load_table(path, MAX_SEEDS)
        results = read_results(RESULTS / table.data)
        seeds = [{s for s, run in r.runs.items() if run.name in results} for r in table.rows]
        if sum(map(bool, seeds)) >= min(5, len(seeds) / 2):
            yield load_table(path, max(set().union(*seeds))), results


def render_page():
    """The text of docs/results.md."""
    parts = [INTRODUCTION]
    shown = []
    for table, results in tables_with_results():
        shown.append(table.name)
        parts.append(render_markdown(table, results).replace("### ", "## ", 1))
        parts.append(f"`make reproduce TABLE={table.name}`\n")
    paths = sorted((RESULTS / "tables").glob("*.yaml"))
    rest = [f"* `{p.stem}`: {load_table(p, 1).title}" for p in paths if p.stem not in shown]
    parts.append("## Not run yet, or too little of it to show\n\n" + "\n".join(rest) + "\n")
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
