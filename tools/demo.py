#!/usr/bin/env python
"""The demo: digit scenes, a teacher, a plain and a distilled student; a table and pictures.

Every training is an ordinary `train_net.py` command, printed before it runs; its log lies in its
output folder. Finished parts are kept, so that an interrupted demo goes on where it stopped.
"""

import argparse
import json
import time
from pathlib import Path

from globalkd.analysis.curves import draw_curves
from globalkd.analysis.demo_figures import draw_detections, draw_reliability
from globalkd.analysis.html import Page
from globalkd.analysis.report import build_report
from globalkd.data import make_digit_scenes
from globalkd.engine.command_line import positive
from globalkd.experiments.provenance import commit, machine
from globalkd.experiments.tables import detector_rows, render_detectors
from globalkd.experiments.training import TrainingFailed, summarize, train

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {
    "curves.png": "AP and detection loss of all students.",
    "detections.png": "The first validation images.",
    "reliability.png": "Reliability of clean and of ambiguous instances.",
}


def train_here(folder, config, opts):
    """Train by train_net.py; the demo ends where a training fails."""
    try:
        return train(ROOT, folder, config, opts)
    except TrainingFailed as error:
        raise SystemExit(str(error)) from error


def run_seed(output, teacher, seed, data_opts):
    """Train the common start, then the plain and the distilled student from it."""
    opts = [*data_opts, "SEED", str(seed)]
    start = train_here(output / f"start_seed{seed}", "configs/quick/start_R18.yaml", opts)
    opts += ["MODEL.WEIGHTS", str(start / "model_final.pth")]
    plain = train_here(output / f"plain_seed{seed}", "configs/quick/student_R18.yaml", opts)
    weights = ["MODEL.GLOBALKD.TEACHER.WEIGHTS", str(teacher / "model_final.pth")]
    distilled = train_here(
        output / f"distilled_seed{seed}", "configs/quick/gkd_R34_R18.yaml", opts + weights
    )
    return plain, distilled


def collect(folders):
    """Lists over seeds: metric name -> values."""
    rows = [
        {**summarize(folder), "checkpoint": str(folder / "model_final.pth")} for folder in folders
    ]
    return {key: [row[key] for row in rows] for key in rows[0]}


def write_report(output, plain, distilled, detectors):
    """What the demo found, and below it the report of the first seed's distilled student."""
    page = Page("The demo: a teacher and its students on digit scenes")
    page.table(*detector_rows(detectors))
    for name, caption in FIGURES.items():
        page.image(output / name, caption)
    page.heading("The distilled student, seed 1")
    parts = ["compare", "noise", "discrepancy"]
    build_report(distilled, plain=plain, parts=parts, page=page)
    page.write(output / "report.html")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="output/demo", help="folder for everything")
    parser.add_argument("--seeds", type=positive, default=1, help="number of seeds")
    args = parser.parse_args()
    begin, made_with = time.time(), {"commit": commit(ROOT), "machine": machine()}
    output = Path(args.output).resolve()
    scenes = output / "digit_scenes"
    make_digit_scenes(scenes, num_train=1000, num_val=200)
    datasets = [
        [f"digit_scenes_{split}", str(scenes / f"{split}.json"), str(scenes / split)]
        for split in ("train", "val")
    ]
    data_opts = ["DATASETS.COCO", json.dumps(datasets)]
    teacher = train_here(
        output / "teacher", "configs/quick/teacher_R34.yaml", [*data_opts, "SEED", "1"]
    )
    pairs = [run_seed(output, teacher, seed, data_opts) for seed in range(1, args.seeds + 1)]
    plains, distilleds = zip(*pairs)
    detectors = {
        "teacher": collect([teacher]),
        "plain": collect(plains),
        "distilled": collect(distilleds),
    }
    reliability = draw_reliability(output / "reliability.png", distilleds[0])
    results = {**detectors, "reliability_auc": reliability, **made_with}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    text = render_detectors(detectors)
    (output / "table.md").write_text(text)
    draw_curves(output / "curves.png", {"plain": plains, "distilled": distilleds})
    runs = {"teacher": teacher, "plain": plains[0], "distilled": distilleds[0]}
    draw_detections(output / "detections.png", runs)
    write_report(output, plains[0], distilleds[0], detectors)
    print(
        f"\n{text}\nAll of it, with pictures, in {output / 'report.html'} "
        f"({(time.time() - begin) / 60:.1f} min)"
    )


if __name__ == "__main__":
    main()
