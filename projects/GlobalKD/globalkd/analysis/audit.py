"""Which annotations of a dataset may be wrong: labels, boxes, hopeless ones, and missing ones.

Every annotation gets scores from the two feature spaces and from both detectors' predictions; see
`audit_scores`. Writes audit.csv (all annotations, all scores), unannotated.csv (detections where
nothing is annotated) and audit.html with crops of the most suspicious. Where the dataset has
planted errors (tools/plant_errors.py), measured.csv says how well each score finds them.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from torch import nn

from .annotations import (
    Annotations,
    corners,
    crop,
    dataset_annotations,
    make_prototypes,
    training_instances,
)
from .audit_measure import measure_scores, measure_unannotated
from .audit_scores import best_other_margin, class_support, space_scores, unannotated_objects
from .detections import annotated_instances, detect
from .html import Page
from .runs import add_run_arguments, load_run, output_folder, read_config
from .tables import as_text, write_csv

#: The page's lists of annotations: title, the score that ranks it, what it means.
LISTS = (
    ("Wrong labels?", "label_teacher", "The teacher sees the class after the arrow there."),
    ("Wrong boxes?", "box_teacher", "The teacher is sure of an object there, in another box."),
    ("Hopeless?", "unseen", "Neither detector finds anything there."),
    ("Least reliable", "unreliability", "The two feature spaces disagree most (Eq. 8)."),
)
ORANGE, CYAN = (255, 170, 0), (0, 200, 255)
#: Side of a crop in pixels.
SIDE = 160


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        annotations: the dataset's annotations.
        scores: name -> (R,), larger is more suspicious.
        suggested: (R,) the class whose detections by the teacher support the box most.
        teacher_boxes: (R, 4) the teacher's detection that supports the box most, XYXY_ABS; NaN
            where it detects nothing there.
        unannotated: one dict for each object without annotation, most certain first: "image" (the
            position in the dataset), "class" (its id), "box" (XYXY_ABS), "score".
    """

    annotations: Annotations
    scores: Dict[str, np.ndarray]
    suggested: np.ndarray
    teacher_boxes: np.ndarray
    unannotated: List[dict]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "audit")
    parser.add_argument("--show", type=int, default=40, help="crops in each list of the page")


def main(args: argparse.Namespace) -> None:
    cfg = read_config(args.run, args.opts)
    model = load_run(args.run, args.checkpoint, distiller=True, opts=args.opts)
    dataset = args.dataset or cfg.DATASETS.TEST[0]
    folder = output_folder(args)
    found = audit(model, cfg, dataset)
    names = MetadataCatalog.get(dataset).thing_classes
    write_csv(folder / "audit.csv", annotation_rows(found, names))
    if found.unannotated:
        write_csv(folder / "unannotated.csv", unannotated_rows(found, names))
    measured = measure(found, dataset)
    if measured:
        write_csv(folder / "measured.csv", measured)
        print(as_text(measured))
    print(audit_page(found, names, dataset, show=args.show).write(folder / "audit.html"))


def audit(model: nn.Module, cfg: CfgNode, dataset: str) -> Audit:
    """Score every annotation of a dataset, and look for objects without one.

    Args:
        model: a distilling meta-architecture; its bank holds new prototypes afterwards.
        cfg: its configuration; says how images are read and resized.
        dataset: a registered name.

    Raises:
        ValueError: the run has no prototypes, or its teacher other classes than the student.
    """
    annotations = dataset_annotations(model, dataset)
    make_prototypes(model, training_instances(model)[1])
    teacher, num_classes = model.distiller.teacher, model.distiller.bank.num_classes
    if teacher.num_classes != num_classes:
        raise ValueError(
            f"The teacher has {teacher.num_classes} classes and the student {num_classes}: the "
            "teacher's predictions say nothing of these annotations."
        )
    scores = space_scores(model, annotations.features)
    records = annotations.records
    detections = {
        "teacher": detect(
            teacher.model,
            cfg,
            records,
            threshold=0.0,
            input_format=teacher.input_format,
            name="teacher",
        ),
        "student": detect(model, cfg, records, threshold=0.0, name="student"),
    }
    support, boxes = {}, {}
    for name, found in detections.items():
        support[name], moved, boxes[name] = class_support(annotations.features, found, num_classes)
        margin = best_other_margin(support[name], annotations.features.classes)
        scores.update({f"label_{name}": margin.numpy(), f"box_{name}": moved.numpy()})
    scores["unseen"] = 1 - np.mean([s.amax(dim=1).numpy() for s in support.values()], axis=0)
    return Audit(
        annotations=annotations,
        scores=scores,
        suggested=support["teacher"].argmax(dim=1).numpy(),
        teacher_boxes=boxes["teacher"].numpy(),
        unannotated=_unannotated(records, detections),
    )


def _unannotated(records: List[dict], detections: Dict[str, List[Instances]]) -> List[dict]:
    rows = []
    for i, record in enumerate(records):
        found = unannotated_objects(
            annotated_instances(record), detections["teacher"][i], detections["student"][i]
        )
        columns = (found.pred_classes, found.pred_boxes.tensor, found.agreed)
        for label, box, score in zip(*(column.tolist() for column in columns)):
            rows.append({"image": i, "class": label, "box": box, "score": score})
    return sorted(rows, key=lambda row: -row["score"])


def measure(found: Audit, dataset: str) -> List[dict]:
    """How well the scores find what is known to be wrong; see `audit_measure`.

    Planted errors, and among the other annotations those of known ambiguity as "ambiguous". Empty
    where the dataset has neither.
    """
    planted = found.annotations.field("planted_error", "none")
    ambiguous = found.annotations.field("ambiguity", 0.0) > 0
    rows = measure_scores(found.scores, planted)
    rows += measure_unannotated(found.unannotated, found.annotations.records, dataset)
    untouched = planted == "none"
    kinds = np.where(ambiguous, "ambiguous", "none")[untouched]
    return rows + measure_scores({n: s[untouched] for n, s in found.scores.items()}, kinds)


def annotation_rows(found: Audit, names: Sequence[str]) -> List[dict]:
    """One dict for each annotation, in the dataset's order, with all scores.

    "annotation" is its id in a COCO JSON, else its place in the image's annotations. The teacher's
    box stands there as a COCO JSON has boxes, empty where it detects nothing.
    """
    features = found.annotations.features
    return [
        {
            "file": found.annotations.file(i),
            "annotation": found.annotations.number(i),
            "class": names[int(features.classes[i])],
            "suggested": names[found.suggested[i]],
            **corners(features.boxes[i]),
            **_teacher_box(found.teacher_boxes[i]),
            **{name: float(score[i]) for name, score in found.scores.items()},
        }
        for i in range(len(features))
    ]


def _teacher_box(box: np.ndarray) -> Dict[str, float]:
    """XYXY_ABS as the columns x, y, width and height."""
    x1, y1, x2, y2 = (float(v) for v in box)
    columns = {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1}
    return {f"teacher_{name}": round(value, 1) for name, value in columns.items()}


def unannotated_rows(found: Audit, names: Sequence[str]) -> List[dict]:
    """One dict for each object without annotation, most certain first."""
    return [
        {
            "file": found.annotations.records[row["image"]]["file_name"],
            "class": names[row["class"]],
            **corners(row["box"]),
            "score": row["score"],
        }
        for row in found.unannotated
    ]


def audit_page(found: Audit, names: Sequence[str], dataset: str, *, show: int) -> Page:
    """The page with crops of the most suspicious annotations."""
    annotations = found.annotations
    page = Page(f"Audit of {dataset}")
    page.paragraph(
        f"{len(annotations)} annotations in {len(annotations.records)} images. Nothing here is "
        "proven wrong: the lists say where to look first. audit.csv has all annotations and all "
        "scores."
    )
    page.legend({"as annotated": ORANGE, "as the teacher detects it": CYAN})
    for title, name, meaning in LISTS:
        score = found.scores[name]
        first = [i for i in np.argsort(-score, kind="stable")[:show] if score[i] > 0]
        page.heading(title)
        page.paragraph(f"{meaning} Ranked by {name}.")
        page.gallery(_annotation_picture(found, i, name, names) for i in first)
    page.heading("Objects without annotation?")
    page.paragraph("Both detectors see them. Ranked by score times the student's agreement.")
    page.gallery(_unannotated_picture(found, row, names) for row in found.unannotated[:show])
    return page


def _annotation_picture(found: Audit, i: int, ranked_by: str, names: Sequence[str]):
    """An annotation's crop, for "box_teacher" with the teacher's box, and its caption."""
    annotations = found.annotations
    box = annotations.features.boxes[i].numpy()
    outlines, around = [(box, ORANGE)], box
    if ranked_by == "box_teacher":
        other = found.teacher_boxes[i]
        outlines.append((other, CYAN))
        around = [*np.minimum(box, other)[:2], *np.maximum(box, other)[2:]]
    text = names[int(annotations.features.classes[i])]
    if ranked_by == "label_teacher":
        text += f" → {names[found.suggested[i]]}"
    file, number = annotations.file(i), annotations.number(i)
    return (
        crop(file, around, size=SIDE, outlines=outlines),
        f"{text}, {found.scores[ranked_by][i]:.2f} (annotation {number} in {Path(file).name})",
    )


def _unannotated_picture(found: Audit, row: dict, names: Sequence[str]):
    file = found.annotations.records[row["image"]]["file_name"]
    return (
        crop(file, row["box"], size=SIDE, outlines=[(row["box"], CYAN)]),
        f"{names[row['class']]}, {row['score']:.2f} ({Path(file).name})",
    )
