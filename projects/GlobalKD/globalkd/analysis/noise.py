"""Noisy knowledge: which of the teacher's errors its students make as well (the paper's Fig. 3).

Errors are sorted into the kinds of TIDE (Bolya et al., 2020), an annotation that nothing finds
included. A student has inherited an error of the teacher if it makes one of the same kind, of the
same class, at the same place (IoU 0.5; for a missed one, of the same annotation). A plain student
beside the distilled one shows how many of them come from the data and not from the teacher.
Written: noise.csv (counts), noise_errors.csv (each error of the teacher), noise.png, summary.txt.
"""

import argparse
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from ..engine.command_line import positive
from .detection_errors import KINDS, ImageErrors, image_errors, inherited
from .detections import annotated_instances, detect
from .error_panels import draw_error_grid
from .runs import add_run_arguments, load_run, load_teacher, output_folder, read_config
from .tables import as_text, write_csv


def inheritance(
    teacher: Sequence[ImageErrors], students: Dict[str, Sequence[ImageErrors]]
) -> Dict[str, List[np.ndarray]]:
    """`inherited` of each student in each image: student name -> one array an image."""
    return {
        name: [inherited(t, s) for t, s in zip(teacher, errors)]
        for name, errors in students.items()
    }


def count_table(teacher, students, shared) -> List[dict]:
    """A row for each kind, and one for all: the teacher's errors, each student's, and the shared.

    Args:
        teacher: the teacher's `ImageErrors`, image by image.
        students: name -> a student's.
        shared: from `inheritance`.
    """
    kinds = np.concatenate([e.kinds for e in teacher])
    rows = []
    for kind in (*KINDS, "all"):
        row = {"kind": kind, "teacher": _count(kinds, kind)}
        for name, errors in students.items():
            row[name] = _count(np.concatenate([e.kinds for e in errors]), kind)
            row[f"{name}_inherited"] = _count(kinds[np.concatenate(shared[name])], kind)
        rows.append(row)
    return rows


def _count(kinds: np.ndarray, kind: str) -> int:
    return int(((kinds == kind) | (kind == "all")).sum())


def error_list(records, names, teacher, shared) -> List[dict]:
    """One row for each of the teacher's errors: where it is, and which students make it too."""
    rows = []
    for i, (record, errors) in enumerate(zip(records, teacher)):
        columns = zip(errors.kinds, errors.classes, errors.scores, errors.boxes.round(1).tolist())
        for j, (kind, label, score, box) in enumerate(columns):
            row = {"image": record["file_name"], "kind": kind, "class": names[label]}
            row["score"] = "" if np.isnan(score) else round(float(score), 3)
            row.update(zip(("x1", "y1", "x2", "y2"), box))
            row.update({student: int(flags[i][j]) for student, flags in shared.items()})
            rows.append(row)
    return rows


def noise_report(
    run,
    *,
    output: Path,
    plain="",
    dataset: str = "",
    checkpoint: str = "model_final.pth",
    threshold: float = 0.5,
    num_images: int = 4,
    opts: Sequence[str] = (),
) -> List[dict]:
    """Compare the errors of a run's teacher and students and write what the module names.

    Args:
        run: output folder of a distilled run.
        output: an existing folder.
        plain: output folder of the plain student; empty for none.
        dataset: a registered name; empty for the first of DATASETS.TEST.
        checkpoint: file name in `run`.
        threshold: least score of a detection.
        num_images: images in the picture, those with most errors of the teacher.
        opts: overrides of both runs' configurations.

    Returns:
        The rows of `count_table`.

    Raises:
        ValueError: the run was not distilled, or a detector has other classes than the dataset.
    """
    teacher = load_teacher(run, opts)
    cfg = read_config(run, opts)
    dataset = dataset or cfg.DATASETS.TEST[0]
    records, names = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset).thing_classes
    detectors = {"teacher": (teacher.model, cfg, teacher.input_format)}
    if plain:
        detectors["plain"] = (load_run(plain, opts=opts), read_config(plain, opts), "")
    detectors["distilled"] = (load_run(run, checkpoint, opts=opts), cfg, "")
    for name, (model, *_) in detectors.items():
        _require_classes(name, model, dataset, len(names))
    found = {
        name: detect(model, of, records, threshold=threshold, input_format=input_format, name=name)
        for name, (model, of, input_format) in detectors.items()
    }
    truth = [annotated_instances(record) for record in records]
    students = {name: [image_errors(*x) for x in zip(f, truth)] for name, f in found.items()}
    wrong = students.pop("teacher")
    shared = inheritance(wrong, students)
    counts = count_table(wrong, students, shared)
    write_csv(output / "noise.csv", counts)
    errors = error_list(records, names, wrong, shared)
    if errors:
        write_csv(output / "noise_errors.csv", errors)
    text = _summary(counts[-1], list(students), f"{len(records)} images of {dataset}", threshold)
    (output / "summary.txt").write_text(text + "\n")
    worst = sorted(range(len(records)), key=lambda i: -len(wrong[i].kinds))[:num_images]
    draw_error_grid(
        output / "noise.png",
        [records[i] for i in worst],
        [truth[i] for i in worst],
        {name: [f[i] for i in worst] for name, f in found.items()},
        names,
    )
    return counts


def _require_classes(detector: str, model: nn.Module, dataset: str, expected: int) -> None:
    count = getattr(model, "roi_heads", model).num_classes
    if count != expected:
        raise ValueError(
            f"The {detector} detector has {count} classes and the dataset {dataset!r} {expected}: "
            "its detections cannot be told right or wrong by these annotations."
        )


def _summary(total: dict, students: Sequence[str], images: str, threshold: float) -> str:
    sentences = [
        f"{images}, detections of score {threshold:g} or more: the teacher makes "
        f"{total['teacher']} errors."
    ]
    for name in students:
        inherited_count = total[f"{name}_inherited"]
        share = 100 * inherited_count / max(total["teacher"], 1)
        sentences.append(
            f"The {name} student makes {total[name]} errors, among them {inherited_count} "
            f"({share:.0f}%) of the teacher's."
        )
    return " ".join(sentences)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "noise")
    parser.add_argument("--plain", default="", help="output folder of the plain student")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of a detection")
    parser.add_argument("--num-images", type=positive, default=4, help="images in the picture")


def main(args: argparse.Namespace) -> None:
    output = output_folder(args)
    counts = noise_report(
        args.run,
        output=output,
        plain=args.plain,
        dataset=args.dataset,
        checkpoint=args.checkpoint,
        threshold=args.threshold,
        num_images=args.num_images,
        opts=args.opts,
    )
    print(f"{(output / 'summary.txt').read_text()}\n{as_text(counts)}")
