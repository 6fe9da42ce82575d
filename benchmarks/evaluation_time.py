#!/usr/bin/env python
"""COCO evaluation of synthetic detections: the fast implementation beside pycocotools'.

    benchmarks/evaluation_time.py --json benchmarks/results/evaluation_time.json

The size is COCO val's: 5,000 images, seven boxes of 80 classes each, 100 detections an image. Seven
of those are the truth, shifted; the others are noise. Both must give the same numbers.
"""

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Dict, List

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from globalkd.engine.coco_evaluation import FasterCOCOeval

CLASSES, SIDE, BOXES = 80, 640, 7


def boxes_of(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 4) XYWH boxes, their sides log-uniform over 5 to 70 % of the image's."""
    side = np.exp(rng.uniform(np.log(0.05), np.log(0.7), (count, 2))) * SIDE
    return np.concatenate([rng.uniform(0, 1, (count, 2)) * (SIDE - side), side], axis=1)


def synthetic(num_images: int, per_image: int):
    """A COCO dataset with annotations, and as many detections of it."""
    rng = np.random.default_rng(0)
    annotations, detections = [], []
    for image in range(1, num_images + 1):
        truth, noise = boxes_of(BOXES, rng), boxes_of(per_image - BOXES, rng)
        classes = rng.integers(1, CLASSES + 1, per_image)
        for box, category in zip(truth, classes):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(category),
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                }
            )
        shifted = truth * rng.uniform(0.9, 1.1, truth.shape)
        scores = np.r_[rng.uniform(0.2, 1, BOXES), rng.uniform(0, 0.6, len(noise))]
        for box, category, score in zip(np.r_[shifted, noise], classes, scores):
            detections.append(
                {
                    "image_id": image,
                    "category_id": int(category),
                    "bbox": box.tolist(),
                    "score": float(score),
                }
            )
    dataset = {
        "info": {},
        "images": [
            {"id": i, "height": SIDE, "width": SIDE, "file_name": f"{i}.jpg"}
            for i in range(1, num_images + 1)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)],
        "annotations": annotations,
    }
    truth = COCO()
    truth.dataset = dataset
    truth.createIndex()
    return truth, truth.loadRes(detections)


def evaluate(implementation, truth: COCO, found: COCO) -> Dict:
    """CPU time of evaluate, accumulate and summarize, and the twelve numbers."""
    evaluation = implementation(truth, found, "bbox")
    start = time.process_time()
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {
        "seconds": time.process_time() - start,
        "stats": list(map(float, evaluation.stats[:12])),
    }


def table(rows: List[dict]) -> str:
    """The rows for people, as Markdown."""
    lines = [
        [r["implementation"], f"{r['seconds']:.1f}", f"{100 * r['stats'][0]:.2f}"] for r in rows
    ]
    return tabulate(lines, ["implementation", "seconds", "AP"], "github", disable_numparse=True)


def main(argv=None) -> List[dict]:
    """Measure, compare, print the table, write the JSON; the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="for each image")
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args(argv)
    rows = []
    for name, implementation in (
        ("pycocotools", COCOeval),
        ("faster-coco-eval", FasterCOCOeval),
    ):
        with contextlib.redirect_stdout(io.StringIO()):  # both evaluate data of their own
            result = evaluate(implementation, *synthetic(args.images, args.detections))
        rows.append(
            {
                "implementation": name,
                "images": args.images,
                "detections": args.images * args.detections,
                **result,
            }
        )
    slow, fast = rows
    if not np.allclose(slow["stats"], fast["stats"], rtol=0, atol=1e-6):
        raise SystemExit(f"The numbers differ: {slow['stats']} and {fast['stats']}")
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
