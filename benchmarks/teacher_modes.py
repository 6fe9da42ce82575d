#!/usr/bin/env python
"""Ways to run the teacher's backbone faster: what each gains, and what it does to the losses.

    benchmarks/teacher_modes.py --threads 2 --compile

The passes take turns in one process; the gain is over the detector as Detectron2 runs it. The
effect is the largest relative change of a term of GlobalKD's step to the default's, with the same
student, images and draws. Two of the ways are no settings of this project: inference mode, whose
tensors autograd refuses to keep for a backward pass, and a backbone without a level that no loss
reads, which comes by itself with such losses.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Callable, Dict, List

import torch
from detectron2.utils.events import EventStorage
from setting import fill_bank, make_batch, seconds
from step_time import Case
from tabulate import tabulate

from globalkd.distiller import Distiller
from globalkd.losses.building import build_loss
from globalkd.teacher import Teacher
from globalkd.teacher.cutting import cut_backbone

STOCK = "as Detectron2 runs it"


def teachers_of(case: Case, compiled: bool) -> Dict[str, Teacher]:
    """Setting -> a teacher that runs with it, all with the weights of the case's own."""
    model = case.teacher.model
    settings = {
        "PRECISION bf16": {"precision": "bf16"},
        "PRECISION fp16": {"precision": "fp16"},
        "INPUT_SCALE 0.75": {"input_scale": 0.75},
        "INPUT_SCALE 0.5": {"input_scale": 0.5},
    }
    if case.device == "cuda":
        settings["CUDA_GRAPHS"] = {"cuda_graphs": True}
        settings["CUDA_GRAPHS, fp16"] = {"cuda_graphs": True, "precision": "fp16"}
    if compiled:
        settings["COMPILE"] = {"compile": True}
        settings["COMPILE, bf16"] = {"compile": True, "precision": "bf16"}
    if compiled and case.device == "cuda":
        modes = {"cuda_graphs": True, "compile": True, "precision": "fp16"}
        settings["CUDA_GRAPHS, COMPILE, fp16"] = modes
    make = {"input_format": case.teacher.input_format}
    teachers = {"default": Teacher(model, **make)}
    teachers.update({name: Teacher(model, **make, **kwargs) for name, kwargs in settings.items()})
    return teachers


def other_ways(case: Case, batch: List[dict]) -> Dict[str, Callable]:
    """Passes that are no settings, for their times alone."""
    default = case.teacher
    images = default.model.preprocess_image(batch).tensor

    if case.device == "cpu" or default._backbone._channels_last:  # as the default
        images = images.contiguous(memory_format=torch.channels_last)

    def inference_mode():
        with torch.inference_mode():
            default.model.backbone(images)

    cut = cut_backbone(default.model.backbone, ["p3", "p4", "p5", "p6"])

    def without_finest_level():
        with torch.no_grad():
            cut(images)

    return {"inference mode": inference_mode, "no loss reads p2": without_finest_level}


def term_errors(case: Case, teachers: Dict[str, Teacher], batch: List[dict]) -> Dict[str, float]:
    """Setting -> largest relative change of a term of GlobalKD's step."""
    losses = [build_loss(case.cfg, name) for name in case.cfg.MODEL.GLOBALKD.LOSSES]
    distiller = Distiller(**{**case.settings, "losses": losses})
    distiller.attach(case.student)
    distiller.start(case.student)
    fill_bank(distiller.bank)
    case.student.distiller = distiller
    found = {}
    for name, teacher in teachers.items():
        distiller._teacher = (teacher,)
        torch.manual_seed(0)
        with EventStorage(1):  # with gradient: without, it would be no training step
            terms = case.student(batch)
        found[name] = {k: v.item() for k, v in terms.items() if k.startswith("loss_kd")}
    case.student.distiller = None
    right = found["default"]
    return {name: max(abs(x[k] / right[k] - 1) for k in right) for name, x in found.items()}


def measure(case: Case, batch: List[dict], rounds: int, compiled: bool) -> List[dict]:
    """One row for each way."""
    teachers = teachers_of(case, compiled)
    calls = {
        name: lambda teacher=teacher: teacher.features(batch, teacher.input_format)
        for name, teacher in teachers.items()
    }
    calls = {STOCK: lambda: case.teacher_pass(batch), **calls, **other_ways(case, batch)}
    times = {name: [] for name in calls}
    for call in [*calls.values()] * 2:  # twice: a graph is recorded at the second
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, case.device))
    errors = term_errors(case, teachers, batch)
    stock = times[STOCK]
    return [
        {
            "way": name,
            "seconds": median(own),
            "gain": median(s / t for s, t in zip(stock, own)),
            "change_of_losses": errors.get(name),
        }
        for name, own in times.items()
    ]


def table(rows: List[dict]) -> str:
    """The rows for people, as Markdown."""
    lines = [
        {
            "teacher's pass": row["way"],
            "seconds": f"{row['seconds']:.3f}",
            "times as fast": f"{row['gain']:.2f}",
            "largest change of a loss": (
                "" if row["change_of_losses"] is None else f"{row['change_of_losses']:.2%}"
            ),
        }
        for row in rows
    ]
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def main(argv=None) -> List[dict]:
    """Measure, print the table, write the JSON; the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pair", default="R101-R50")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--images", type=int, default=2, help="images of a batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well (minutes)")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE ... of the configuration")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    case = Case(args.pair, "rcnn", device=args.device, precision="fp32", opts=args.opts)
    batch = make_batch(args.images, args.size, case.num_classes)
    rows = measure(case, batch, args.rounds, args.compile)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
