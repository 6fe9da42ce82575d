"""Plant known errors into a COCO JSON, to measure how well they are found again.

Three kinds, drawn from disjoint annotations: another class ("label"), a shifted and resized box
("box"), and an annotation that is taken away ("missing"). What was changed stands in the file.
"""

import json
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
from detectron2.utils.file_io import PathManager

#: A planted box overlaps the true one by an IoU in this range.
BOX_IOU = (0.3, 0.6)
BOX_TRIES = 200


def plant_errors(
    json_file,
    output,
    *,
    label_share: float = 0.05,
    box_share: float = 0.05,
    missing_share: float = 0.05,
    seed: int = 0,
) -> List[Dict]:
    """Copy a COCO JSON with errors in it. The same arguments give the same bytes.

    Every annotation that stays carries "planted_error": "none", "label" or "box". The list that is
    returned stands in the file as info.planted_errors.

    Args:
        json_file: annotations in COCO format.
        output: the file to write; its folder is made.
        label_share: share of the annotations, in [0, 1], that get another class, each other class
            with the same probability.
        box_share: share whose box is moved and resized, to an IoU within `BOX_IOU`. A box for
            which the image leaves no room keeps its place and does not count.
        missing_share: share that is taken away.
        seed: of every random choice.

    Returns:
        One dict for each changed annotation, as it was, with "planted_error".

    Raises:
        ValueError: the shares are negative or more than all, or there is one class only to choose
            labels from.
    """
    shares = (label_share, box_share, missing_share)
    if min(shares) < 0 or sum(shares) > 1:
        raise ValueError(f"the shares must be 0 or more and at most 1 together; got {shares}")
    with PathManager.open(str(json_file), "rb") as stream:  # bytes may begin with a BOM
        content = json.loads(stream.read())
    classes = sorted(category["id"] for category in content["categories"])
    if label_share > 0 and len(classes) < 2:
        raise ValueError(f"{json_file} has one class: no label can be wrong; set label_share 0")
    rng = np.random.default_rng(seed)
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    kinds = _draw_kinds(rng, len(content["annotations"]), shares)
    kept, changed = [], []
    for annotation, kind in zip(content["annotations"], kinds):
        planted = {**annotation, "planted_error": kind}
        if kind == "label":
            others = [c for c in classes if c != annotation["category_id"]]
            planted["category_id"] = others[rng.integers(len(others))]
        elif kind == "box":
            _move_box(rng, planted, sizes[annotation["image_id"]])
        if kind != "missing":
            kept.append(planted)
        if planted["planted_error"] != "none":
            changed.append({**annotation, "planted_error": kind})
    content["annotations"] = kept
    content["info"] = {**content.get("info", {}), "planted_errors": changed}
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(content))
    return changed


def _draw_kinds(rng, count: int, shares: Tuple[float, float, float]) -> np.ndarray:
    numbers = [round(share * count) for share in shares]
    kinds = np.full(count, "none", dtype=object)
    order = rng.permutation(count)
    for kind, rows in zip(("label", "box", "missing"), np.split(order, np.cumsum(numbers))):
        kinds[rows] = kind
    return kinds


def _move_box(rng, annotation: Dict, image_size: Tuple[int, int]) -> None:
    """Move and resize the box in place; "none" for `planted_error` where no try fits."""
    x, y, width, height = annotation["bbox"]
    for _ in range(BOX_TRIES):
        scale = np.exp(rng.uniform(-0.5, 0.5, 2))
        w, h = width * scale[0], height * scale[1]
        left = x + width / 2 + rng.uniform(-0.5, 0.5) * width - w / 2
        top = y + height / 2 + rng.uniform(-0.5, 0.5) * height - h / 2
        inside = left >= 0 and top >= 0 and left + w <= image_size[0] and top + h <= image_size[1]
        moved = [round(float(v), 2) for v in (left, top, w, h)]
        if inside and BOX_IOU[0] <= _iou(annotation["bbox"], moved) <= BOX_IOU[1]:
            annotation["bbox"], annotation["area"] = moved, moved[2] * moved[3]
            annotation.pop("segmentation", None)
            return
    annotation["planted_error"] = "none"


def _iou(a, b) -> float:
    """Intersection over union of two XYWH boxes."""
    overlap = [max(0.0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    shared = overlap[0] * overlap[1]
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)
