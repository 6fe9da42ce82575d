#!/usr/bin/env python
"""Run a table of experiments: every row with every seed, then Markdown, CSV and a picture of it.

    tools/reproduce.py digits_modules --seeds 3
    tools/reproduce.py coco_main --num-gpus 8

Tables lie in results/tables/. Finished runs are kept and interrupted ones resumed, so that the same
command goes on where it stopped; what has a result file is not run again, unless others need its
weights. A run that fails does not end the others; it is named at the end.
"""

import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from globalkd.data import make_digit_scenes
from globalkd.engine.command_line import positive, user_errors
from globalkd.experiments.figures import draw_table
from globalkd.experiments.matrix import config_digest, load_table
from globalkd.experiments.provenance import commit, machine
from globalkd.experiments.scheduling import execute_in_order
from globalkd.experiments.tables import read_results, render_csv, render_markdown
from globalkd.experiments.training import summarize, train, training_command

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "results/tables"


def digit_scenes(folder):
    """Digit scenes as overrides: trained on "train", evaluated on "test", which tuned nothing.

    Tables of what was tried evaluate on "val".
    """
    make_digit_scenes(folder, num_train=1000, num_val=200, num_test=400)
    names = {split: f"digit_scenes_{split}" for split in ("train", "val", "test")}
    datasets = [[n, f"{folder}/{split}.json", f"{folder}/{split}"] for split, n in names.items()]
    return [
        *("DATASETS.COCO", json.dumps(datasets), "DATASETS.TRAIN", json.dumps([names["train"]])),
        *("DATASETS.TEST", json.dumps([names["test"]]), "TEST.EVAL_PERIOD", "0"),
    ]


def bccd(folder):
    """BCCD (blood cells, VOC layout) from a folder of the user's, as overrides."""
    if not Path(folder, "ImageSets/Main").is_dir():
        raise SystemExit(f"--data {folder}: no VOC folder (ImageSets/Main is not there).")
    classes = ["RBC", "WBC", "Platelets"]
    datasets = [[f"bccd_{s}", str(folder), s, classes] for s in ("train", "val", "test")]
    return ["DATASETS.VOC", json.dumps(datasets)]


# How the data of a table comes to be. The others are Detectron2's own: $DETECTRON2_DATASETS.
DATA = {"digits": digit_scenes, "bccd": bccd, "coco": lambda _: [], "voc": lambda _: []}


def relative_to_root(path):
    """Relative to the repository where it lies in it, so that commands hold in another clone."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


@dataclass(frozen=True)
class Place:
    """Where the trainings of some tables lie, and what they have in common."""

    output: Path
    results: Path
    data_opts: tuple

    @classmethod
    def of(cls, table, args):
        output, results = args.output / table.results, args.results / table.results
        for folder in (output, results):
            folder.mkdir(parents=True, exist_ok=True)
        return cls(output, results, tuple(DATA[table.data](args.data or output / "data")))

    def result_file(self, run):
        return self.results / f"{run.name}.json"


def execute(run, place, args, position):
    """Train one run, then write its result file."""
    opts = [*place.data_opts, *run.options(place.output)]
    folder = place.output / run.name
    # Now: the tree may be another one when the training is done.
    made_with = {"config_digest": config_digest(Path(run.config)), "commit": commit(ROOT)}
    train(
        ROOT,
        folder,
        run.config,
        opts,
        threads=args.threads,
        num_gpus=args.num_gpus,
        position=position,
    )
    if place.result_file(run).exists():
        return
    command = training_command(run.config, opts, folder, args.num_gpus)
    result = {
        "config": run.config,
        "config_digest": made_with["config_digest"],
        "seed": run.seed,
        "opts": list(run.opts),
        "teacher": run.teacher.name if run.teacher else None,
        "start": run.start.name if run.start else None,
        "command": shlex.join(["python", *command]),
        "commit": made_with["commit"],
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(threads=args.threads, jobs=args.jobs),
        "metrics": summarize(folder),
    }
    if args.jobs > 1:  # trainings side by side slow each other down
        result["metrics"].pop("seconds_per_step", None)
    place.result_file(run).write_text(json.dumps(result, indent=1) + "\n")


def unfinished(table, place):
    """The runs of a table that have no result, and those that they need."""
    wanted = {run for run in table.runs() if not place.result_file(run).exists()}
    while more := {needed for run in wanted for needed in run.needs} - wanted:
        wanted |= more
    return [(run, place) for run in table.runs() if run in wanted]


def execute_all(tables, places, args):
    """Run the tables, `--jobs` trainings at a time. Returns the failures by name."""
    tasks = [task for table in tables for task in unfinished(table, places[table.name])]
    tasks = list(dict.fromkeys(tasks))  # one run of several tables runs once
    with tqdm(total=len(tasks), desc="runs", unit="run", disable=None) as bar:

        def attempt(task, lane):
            try:
                execute(*task, args, 1 + lane)
            finally:
                bar.update()

        failures = execute_in_order(
            tasks, lambda task: [(run, task[1]) for run in task[0].needs], attempt, args.jobs
        )
    return {run.name: error for (run, _), error in failures.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ", ".join(sorted(path.stem for path in TABLES.glob("*.yaml")))
    parser.add_argument("tables", nargs="+", metavar="TABLE", help=f"of {known}")
    parser.add_argument("--seeds", type=positive, default=1, help="number of seeds (default: 1)")
    parser.add_argument("--jobs", type=positive, default=1, help="trainings at a time (default: 1)")
    parser.add_argument("--threads", type=int, help="CPU threads of a training")
    parser.add_argument("--num-gpus", type=int, default=0, help="GPUs of a training")
    parser.add_argument("--data", type=Path, help="the data set's folder, where the table needs it")
    parser.add_argument("--output", type=Path, default=ROOT / "output/reproduce")
    parser.add_argument("--results", type=Path, help="result files (default: OUTPUT/results)")
    args = parser.parse_args()
    args.output = relative_to_root(args.output)
    args.results = args.results.resolve() if args.results else args.output / "results"
    args.data = args.data and relative_to_root(args.data)
    os.chdir(ROOT)  # where train_net.py and its relative paths are seen from
    with user_errors(parser):
        tables = [load_table(TABLES / f"{name}.yaml", args.seeds) for name in args.tables]
    kinds = sorted({table.data for table in tables})
    if args.data and len(kinds) > 1:
        parser.error(f"--data names one folder, but the tables need {kinds}: run them separately.")
    places = {table.name: Place.of(table, args) for table in tables}
    failures = execute_all(tables, places, args)
    for table in tables:
        place = places[table.name]
        found = read_results(place.results)
        for suffix, render in ((".md", render_markdown), (".csv", render_csv)):
            (place.output / f"{table.name}{suffix}").write_text(render(table, found))
        draw_table(place.output / f"{table.name}.png", table, found)
        path = place.output / table.name
        print(f"\n{render_markdown(table, found)}\nAlso in {path}.md and .csv; drawn in {path}.png")
    for name, error in failures.items():
        print(f"\nFAILED {name}: {error}", file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
