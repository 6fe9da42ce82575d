#!/usr/bin/env python
"""Render docs/results.md, its pictures, and the tables of README.md and docs/performance.md.

Those lie in results/ and benchmarks/results/. No table is typed by hand: `--check` fails where a
page or a picture differs from what the files say. In README.md and docs/performance.md a table
stands between `<!-- rendered: WHAT ARGUMENTS -->` and `<!-- end -->`; WHAT is a key of `RENDERERS`.
"""

import argparse
import csv
import importlib
import json
import re
import sys
from pathlib import Path
from statistics import mean

from globalkd.experiments.figures import draw_table, drawn_from
from globalkd.experiments.matrix import load_table
from globalkd.experiments.tables import (
    mean_and_spread,
    read_results,
    render_detectors,
    render_markdown,
    render_summary,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
BENCHMARKS = ROOT / "benchmarks"
PAGE = ROOT / "docs/results.md"
FILLED = [ROOT / "README.md", ROOT / "docs/performance.md"]
BLOCK = re.compile(r"(<!-- rendered: (\S+) ?(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
README_TABLES = {
    "digits_main": "digit scenes, Faster R-CNN",
    "digits_main_retinanet": "digit scenes, RetinaNet",
    "bccd_main": "BCCD, Faster R-CNN",
    "bccd_main_retinanet": "BCCD, RetinaNet",
}
README_ROWS = ["teacher", "plain student", "GlobalKD", "DRKD", "GlobalKD + DRKD"]
DRAWN = ["digits_methods", "digits_methods_retinanet"]  # tables that are shown as pictures, too
FIGURES = ROOT / "docs/figures"
MAX_SEEDS = 10
RELIABILITY = RESULTS / "reliability.csv"  # of `tools/analyze.py reliability`
INTRODUCTION = """\
# Results

Rendered by `make results` from the result files in `results/`: one for each run, with its
configuration, overrides, seed, command, commit, machine and metrics. A table is a file in
`results/tables/`, a matrix of configurations and seeds; all its students share a teacher and a
start, as students that begin with ImageNet weights do. A training repeats to the digit on
processors of one kind only, so that what a table compares was run on machines of one kind.

```bash
make reproduce TABLE=digits_modules SEEDS=3                          # one training after the other
make reproduce TABLE=digits_modules SEEDS=3 JOBS=2 ARGS="--threads 1"  # two at a time, on two cores
make reproduce TABLE=coco_main ARGS="--num-gpus 8"                   # $DETECTRON2_DATASETS
make reproduce TABLE=bccd_main SEEDS=3 ARGS="--data my/bccd"         # a VOC folder
make compare                                                         # every method, two seeds
```

BCCD is 364 photographs of blood cells (github.com/Shenggan/BCCD_Dataset); `my/bccd` is the folder
with `Annotations`, `ImageSets` and `JPEGImages`.

A table of your own is one more file there: title, data (`digits`, `bccd`, `coco` or `voc`),
teacher, start, baseline, and rows with a config and opts; `sweep` runs each row for several values
of a key, those of the sweep or the row's own. All keys:
`projects/GlobalKD/globalkd/experiments/matrix.py`.

Finished runs are kept and interrupted ones resumed. Tables, their pictures and result files are
written to `output/reproduce/`; with `ARGS="--results results"` the result files go where this page
is made from. How strongly each method pulls, and how its weights were chosen:
[methods.md](methods.md#how-strongly-each-one-pulls), [tuning.md](tuning.md).
"""


def tables_with_results():
    """Tables of which five rows or half have results, with the seeds that half of these have."""
    for path in sorted((RESULTS / "tables").glob("*.yaml")):
        table = load_table(path, MAX_SEEDS)
        results = read_results(RESULTS / table.results)
        done = [_finished_seeds(row, results) for row in table.rows]
        counts = sorted(filter(None, done), reverse=True)
        if len(counts) >= min(5, len(done) / 2):
            seeds = counts[(len(counts) - 1) // 2]
            yield load_table(path, seeds), results


def _finished_seeds(row, results):
    """How many of a row's first seeds have a result."""
    found = [run.name in results for run in row.runs.values()]
    return found.index(False) if False in found else len(found)


def render_reliability():
    """How well reliability tells ambiguous digits, by detector, type and level, over seeds."""
    with RELIABILITY.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    levels = [*sorted({row["level"] for row in rows} - {"mean"}), "mean"]
    lines = [
        "## Does reliability find the ambiguous instances?",
        "",
        "AUC with which a low weight of Eq. 8 tells ambiguous from clean digits of the test split "
        "(0.5 is chance), by `RELIABILITY.TYPE` and level, and for the mean over levels; mean ± "
        "standard deviation over seeds. Beside it that mean weight of clean and of ambiguous "
        "digits. Students and prototypes as they are at the end of training.",
        "",
        f"| GlobalKD's runs | type | {' | '.join(levels)} | clean | ambiguous |",
        "|---" * (len(levels) + 4) + "|",
    ]
    for name, kind in dict.fromkeys((r["run"].split("-")[1], r["type"]) for r in rows):
        own = [r for r in rows if r["run"].split("-")[1] == name and r["type"] == kind]
        auc = [[float(r["auc"]) for r in own if r["level"] == level] for level in levels]
        last = [r for r in own if r["level"] == "mean"]
        weights = [f"{mean(float(r[key]) for r in last):.3f}" for key in ("clean", "ambiguous")]
        cells = [f"`{name}`, {len(last)} seeds", f"`{kind}`", *map(mean_and_spread, auc), *weights]
        lines.append(f"| {' | '.join(cells)} |")
    runs = dict.fromkeys(row["run"] for row in rows)
    folders = " \\\n    ".join(f"output/reproduce/digits/{run}" for run in runs)
    command = f"python tools/analyze.py reliability --output results \\\n    {folders}"
    return "\n".join([*lines, "", "```bash", command, "```", ""])


def render_page():
    """The text of docs/results.md."""
    parts = [INTRODUCTION]
    shown = []
    for table, results in tables_with_results():
        shown.append(table.name)
        text = render_markdown(table, results, ROOT).replace("### ", "## ", 1)
        if table.name in DRAWN:
            title, rest = text.split("\n", 1)
            picture = f"![{table.metric} of each row](figures/{table.name}.png)"
            text = f"{title}\n\n{picture}\n{rest}"
        parts.append(text)
        seeds = max(len(row.runs) for row in table.rows)
        data = ' ARGS="--data my/bccd"' if table.data == "bccd" else ""
        parts.append(f"`make reproduce TABLE={table.name} SEEDS={seeds}{data}`\n")
    parts.append(render_reliability())
    paths = sorted((RESULTS / "tables").glob("*.yaml"))
    rest = [f"* `{p.stem}`: {load_table(p, 1).title}" for p in paths if p.stem not in shown]
    parts.append("## Not run yet, or too little of it to show\n\n" + "\n".join(rest) + "\n")
    return "\n".join(parts)


def render_main_results():
    """The README's table of test splits: one line a data set and detector."""
    found = {t.name: (t, r) for t, r in tables_with_results()}
    shown = {label: found[name] for name, label in README_TABLES.items() if name in found}
    return render_summary(shown, README_ROWS)


def render_demo(file):
    """The table of a `make demo`, from its results.json."""
    results = json.loads((ROOT / file).read_text())
    return render_detectors({name: results[name] for name in ("teacher", "plain", "distilled")})


def render_benchmark(function, *files):
    """What a benchmark's function, such as `step_time.table`, makes of the rows of some files."""
    sys.path.insert(0, str(BENCHMARKS))
    module, name = function.split(".")
    rows = [json.loads((BENCHMARKS / "results" / file).read_text()) for file in files]
    rows = [row for part in rows for row in (part if isinstance(part, list) else [part])]
    return getattr(importlib.import_module(module), name)(rows) + "\n"


RENDERERS = {
    "main_results": render_main_results,
    "demo": render_demo,
    "benchmark": render_benchmark,
}


def fill(text):
    """A page's text with its tables made anew."""
    return BLOCK.sub(lambda m: m[1] + RENDERERS[m[2]](*m[3].split()) + m[4], text)


def undrawn():
    """Pictures that do not show what the result files say: (file, table, results)."""
    for table, results in tables_with_results():
        path = FIGURES / f"{table.name}.png"
        if table.name in DRAWN and not drawn_from(path, table, results):
            yield path, table, results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if they differ")
    args = parser.parse_args()
    pages = {PAGE: render_page(), **{path: fill(path.read_text()) for path in FILLED}}
    different = [p for p, text in pages.items() if not p.is_file() or p.read_text() != text]
    pictures = list(undrawn())
    if args.check and (different or pictures):
        files = [*different, *(path for path, _, _ in pictures)]
        names = ", ".join(str(path.relative_to(ROOT)) for path in files)
        sys.exit(f"{names}: not what the result files say; run `make results`.")
    for path in different:
        path.write_text(pages[path])
    for picture in pictures:
        draw_table(*picture)


if __name__ == "__main__":
    main()
