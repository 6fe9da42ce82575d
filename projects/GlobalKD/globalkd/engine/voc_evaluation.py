"""The VOC metric for folders registered by config."""

import itertools
import logging
from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from tqdm import tqdm

from ..data.config_checks import require_images

logger = logging.getLogger(__name__)

IOU_THRESHOLDS = np.arange(50, 100, 5) / 100


class VOCFolderEvaluator(DatasetEvaluator):
    """The VOC metric (area under the precision-recall curve) for a folder registered by config.

    Equal to Detectron2's VOC evaluator up to the rounding of scores and boxes that goes with its
    text files, and without its demands on file names and optional tags. The truth is what the
    dataset loads, so boxes that were dropped do not count, nor do images that were not processed.
    "difficult" objects count neither way. A class without objects has AP NaN and takes no part in
    the mean.
    """

    def __init__(self, dataset_name: str):
        self._class_names = MetadataCatalog.get(dataset_name).thing_classes
        records = DatasetCatalog.get(dataset_name)
        require_images(len(records), dataset_name)
        self._truth = {record["image_id"]: record["annotations"] for record in records}

    def reset(self):
        self._predictions = []

    def process(self, inputs, outputs):
        for image, output in zip(inputs, outputs):
            self._predictions.append((image["image_id"], output["instances"].to("cpu")))

    def evaluate(self) -> Dict:
        """Gather from every process and compute; other processes than the first return {}."""
        comm.synchronize()
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return {}
        images_of_class = {label: [] for label in range(len(self._class_names))}
        for image_id, found in itertools.chain(*gathered):
            labels = {annotation["category_id"] for annotation in self._truth[image_id]}
            # A detector may have more outputs than the dataset has classes.
            for label in labels.union(found.pred_classes.tolist()) & images_of_class.keys():
                images_of_class[label].append((image_id, found))
        classes = tqdm(images_of_class.items(), desc="VOC metric", unit="class", disable=None)
        ap = np.stack([self._class_ap(label, images) for label, images in classes])
        defined = ap[~np.isnan(ap).any(1)]
        mean = defined.mean(0) if len(defined) else ap[0]
        results = {"AP": mean.mean(), "AP50": mean[0], "AP75": mean[5]}
        logger.info("VOC evaluation results for bbox:\n" + create_small_table(results))
        results.update({f"AP-{n}": row.mean() for n, row in zip(self._class_names, ap)})
        return {"bbox": {name: float(value) for name, value in results.items()}}

    def _class_ap(self, class_id: int, predictions: List) -> np.ndarray:
        images = []
        for image_id, instances in predictions:
            found = instances[instances.pred_classes == class_id]
            truth = [a for a in self._truth[image_id] if a["category_id"] == class_id]
            boxes = torch.tensor([a["bbox"] for a in truth], dtype=torch.float64).reshape(-1, 4)
            difficult = np.array([a.get("difficult", False) for a in truth], dtype=bool)
            overlaps = pairwise_iou(Boxes(found.pred_boxes.tensor.double()), Boxes(boxes))
            images.append((overlaps.numpy(), found.scores.numpy(), difficult))
        return 100 * voc_average_precision(images, IOU_THRESHOLDS)


def voc_average_precision(
    images: Sequence[Tuple[np.ndarray, np.ndarray, np.ndarray]], thresholds: Sequence[float]
) -> np.ndarray:
    """Average precision of one class by the VOC rule.

    By descending score, a detection is correct if the object it overlaps most is overlapped by
    more than the threshold and not yet found. Detections on "difficult" objects do not count.

    Args:
        images: for each image the (D, G) IoU of D detections with G objects, (D,) scores and (G,)
            bool "difficult".
        thresholds: T IoU thresholds.

    Returns:
        (T,) in [0, 1]; NaN where no object counts.
    """
    best, target, scores, difficult = [], [], [], []
    num_objects = 0
    for overlaps, score, hard in images:
        padded = np.pad(overlaps, ((0, 0), (0, 1)))  # an object that nothing overlaps
        target.append(num_objects + padded.argmax(1))
        best.append(padded.max(1))
        scores.append(score)
        difficult.append(np.append(hard, False))
        num_objects += len(hard) + 1
    positives = sum(int((~image[2]).sum()) for image in images)
    if positives == 0:
        return np.full(len(thresholds), np.nan)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    best, target = np.concatenate(best)[order], np.concatenate(target)[order]
    ignored = np.concatenate(difficult)[target]
    return np.array([_ap_at(best > t, target, ignored, positives) for t in thresholds])


def _ap_at(hit: np.ndarray, target: np.ndarray, ignored: np.ndarray, positives: int) -> float:
    first = np.zeros(len(hit), dtype=bool)
    hits = np.flatnonzero(hit)
    first[hits[np.unique(target[hits], return_index=True)[1]]] = True
    correct = np.cumsum(first & ~ignored)
    wrong = np.cumsum(~first & ~(hit & ignored))
    return voc_ap(correct / positives, correct / np.maximum(correct + wrong, 1))
