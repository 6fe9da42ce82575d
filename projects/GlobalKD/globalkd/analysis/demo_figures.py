"""The pictures of the demo: curves, detections side by side, reliability by kind of instance."""

from pathlib import Path
from typing import Dict, Sequence

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from matplotlib.figure import Figure

from .reliability import ambiguity_auc, dataset_reliability
from .runs import load_run, read_config, read_metrics

COLOURS = {"teacher": "#7f7f7f", "plain": "#1f77b4", "distilled": "#d62728"}
GREEN, RED = (60, 200, 60), (60, 60, 230)  # BGR: right and wrong


def draw_curves(path, folders: Dict[str, Sequence[Path]]) -> None:
    """AP over the training steps of each run, and the detection loss."""
    figure = Figure(figsize=(10, 3.6), layout="tight")
    left, right = figure.subplots(1, 2)
    for name, runs in folders.items():
        for i, folder in enumerate(runs):
            style = {"color": COLOURS[name], "label": name if i == 0 else None, "alpha": 0.8}
            records = read_metrics(folder)
            _plot(left, records, lambda r: r.get("bbox/AP"), marker="o", **style)
            _plot(right, records, _detection_loss, **style)
    left.set(xlabel="step", ylabel="AP", title="AP on the validation scenes")
    right.set(xlabel="step", ylabel="loss", title="Detection loss (without distillation terms)")
    left.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _plot(axis, records, value, **style):
    last = records[-1]["iteration"]  # the evaluation after training is recorded one step later
    points = [(min(r["iteration"] + 1, last), value(r)) for r in records if value(r) is not None]
    axis.plot(*zip(*points), **style) if points else None


def _detection_loss(record):
    terms = [v for k, v in record.items() if k.startswith("loss_") and "_kd_" not in k]
    return sum(terms) if terms else None


def draw_detections(path, folders: Dict[str, Path], *, count: int = 5, threshold: float = 0.5):
    """Ground truth and each detector's detections on the first validation images.

    A detection is green where it hits an annotation of its class with IoU 0.5, else red.
    """
    cfg = read_config(next(iter(folders.values())))
    dataset = cfg.DATASETS.TEST[0]
    names = MetadataCatalog.get(dataset).thing_classes
    records = DatasetCatalog.get(dataset)[:count]
    columns = {"annotations": [_annotations(r) for r in records]}
    for name, folder in folders.items():
        model = load_run(folder)
        columns[name] = [_detect(model, r, threshold) for r in records]
    rows = []
    for i, record in enumerate(records):
        image = cv2.imread(record["file_name"])
        truth = columns["annotations"][i]
        rows.append(np.hstack([_panel(image, c[i], truth, names) for c in columns.values()]))
    header = np.hstack([_header(name, rows[0].shape[1] // len(columns)) for name in columns])
    cv2.imwrite(str(path), np.vstack([header, *rows]))


def _annotations(record) -> Instances:
    boxes = [
        BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in record["annotations"]
    ]
    result = Instances((record["height"], record["width"]))
    result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    result.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
    return result


@torch.no_grad()
def _detect(model, record, threshold) -> Instances:
    image = cv2.imread(record["file_name"])
    pixels = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
    (output,) = model([{"image": pixels, "height": image.shape[0], "width": image.shape[1]}])
    detections = output["instances"].to("cpu")
    return detections[detections.scores >= threshold]


def _panel(image, detections, truth, names, scale=2):
    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    iou = pairwise_iou(detections.pred_boxes, truth.pred_boxes)
    same = detections.pred_classes[:, None] == truth.pred_classes[None]
    hits = ((iou >= 0.5) & same).any(dim=1).tolist()
    for box, label, hit in zip(detections.pred_boxes, detections.pred_classes.tolist(), hits):
        x1, y1, x2, y2 = (box * scale).round().int().tolist()
        colour = GREEN if hit else RED
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, 2)
        cv2.putText(canvas, names[label], (x1, max(y1 - 3, 10)), 0, 0.45, (0, 0, 0), 3)
        cv2.putText(canvas, names[label], (x1, max(y1 - 3, 10)), 0, 0.45, colour, 1)
    return cv2.copyMakeBorder(canvas, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def _header(name, width):
    band = np.full((24, width, 3), 255, np.uint8)
    cv2.putText(band, name, (6, 17), 0, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return band


def draw_reliability(path, folder: Path) -> Dict[str, float]:
    """Reliability of clean and of ambiguous validation instances, by kind, on the finest level.

    The finest level is the one that boxes of this size are predicted from; the right-hand panel
    shows for every level how well reliability tells ambiguous instances from clean ones. The
    prototypes are made anew first: those of the checkpoint belong to an earlier student.

    Returns:
        level -> area under the ROC curve; 0.5 is chance.
    """
    model = load_run(folder, distiller=True)
    model.distiller.refresh(model)
    found = dataset_reliability(model, read_config(folder).DATASETS.TEST[0])
    finest = found.features.levels[0]
    kinds = sorted(set(found.kinds), key=lambda kind: (kind != "none", kind))
    labels = [f"{'clean' if k == 'none' else k}\n(n={(found.kinds == k).sum()})" for k in kinds]
    auc = {k: ambiguity_auc(w, found.ambiguity > 0) for k, w in found.reliability.items()}
    figure = Figure(figsize=(10, 3.6), layout="tight")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    boxes = [found.reliability[finest][found.kinds == kind] for kind in kinds]
    left.boxplot(boxes, tick_labels=labels, showfliers=False)
    left.set(ylabel="reliability", title=f"Reliability weight by kind of instance, level {finest}")
    right.bar(list(auc), list(auc.values()), color=COLOURS["distilled"], alpha=0.8)
    right.axhline(0.5, color="black", linewidth=1)
    right.set(ylim=(0.3, 1.0), ylabel="AUC", title="Ambiguous against clean (0.5: chance)")
    left.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=110)
    return auc
