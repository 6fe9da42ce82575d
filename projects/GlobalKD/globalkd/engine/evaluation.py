"""Evaluators for COCO-format and VOC-format datasets, chosen by a dataset's metadata.

Here: `build_evaluator`; COCO metrics computed by faster-coco-eval where it is installed (equal to
pycocotools'); AP of clean and of ambiguous instances where annotations carry "ambiguity"; the VOC
metric for folders registered by config. Not here: loading (`data/`) and the loop over a dataset
(`detectron2.evaluation.inference_on_dataset`).
"""

import contextlib
import io
import itertools
import logging
import os
from typing import Dict, List, Optional, Sequence, Tuple, Type
from unittest import mock

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.evaluation import coco_evaluation as detectron2_coco
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from ..data.coco_checks import drop_without_segmentation
from ..data.config_checks import require_images, require_integer_ids

try:
    from faster_coco_eval import COCOeval_faster as FastestCOCOeval
except ImportError:
    FastestCOCOeval = COCOeval

logger = logging.getLogger(__name__)

IOU_THRESHOLDS = np.arange(50, 100, 5) / 100


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
) -> DatasetEvaluator:
    """The evaluator of a registered dataset.

    Args:
        cfg: OUTPUT_DIR and TEST.KEYPOINT_OKS_SIGMAS are read.
        dataset_name: a name of DATASETS.TEST.
        output_folder: where predictions are written; None: OUTPUT_DIR/inference.

    Returns:
        An evaluator whose results are {"bbox": {"AP": ..., "AP50": ..., "AP75": ..., ...}}.

    Raises:
        ValueError: the dataset has no images, or is of a kind without an evaluator here.
    """
    require_evaluator(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("evaluator_type", "coco") == "coco":
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
        return FastCOCOEvaluator(dataset_name, output_dir=folder, kpt_oks_sigmas=sigmas)
    if "globalkd_source" in metadata.as_dict():
        return VOCFolderEvaluator(dataset_name)
    return PascalVOCDetectionEvaluator(dataset_name)


def require_evaluator(dataset_name: str) -> None:
    """Raise a ValueError where a registered dataset is of a kind that nothing here evaluates."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind not in ("coco", "pascal_voc"):
        raise ValueError(
            f"DATASETS.TEST: '{dataset_name}' has evaluator_type '{kind}'; 'coco' and "
            "'pascal_voc' are known here. For another one give a subclass of DistillTrainer its "
            "own build_evaluator."
        )


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator with a fast COCOeval and AP by ambiguity.

    Where annotations carry "ambiguity", the results' "bbox" has two more numbers: "AP-clean"
    (instances of ambiguity 0) and "AP-ambiguous" (the others). Instances of the other subset are
    ignored: neither they nor detections matched to them count. A model that detects nothing has AP
    0. NaN stands for what the dataset does not define, such as AP of a class without instances.
    Annotations may have ids of any kind.
    """

    def __init__(self, dataset_name: str, **kwargs):
        # What an earlier run converted to COCO's format may be of other data.
        kwargs.setdefault("allow_cached_coco", False)
        super().__init__(dataset_name, use_fast_impl=False, **kwargs)
        require_images(len(self._coco_api.imgs), dataset_name)
        require_integer_ids(list(self._coco_api.imgs), dataset_name)
        self._use_fast_impl = FastestCOCOeval is not COCOeval
        # COCOeval takes a match with id 0 for none, and text for no id; this is our own copy.
        for number, annotation in enumerate(self._coco_api.dataset.get("annotations", []), 1):
            annotation["id"] = number
            annotation.setdefault("iscrowd", 0)  # many files lack this and the area
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
        self._index()

    def _index(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco_api.createIndex()

    def _eval_predictions(self, predictions, img_ids=None):
        self._leave_out_other_classes(predictions)
        if any("segmentation" in x for image in predictions for x in image["instances"]):
            self._leave_out_boxes_without_mask()
        # Detectron2 takes its fast COCOeval from a module variable; exchanged for this call only.
        with mock.patch.object(detectron2_coco, "COCOeval_opt", FastestCOCOeval):
            super()._eval_predictions(predictions, img_ids)

    def _leave_out_other_classes(self, predictions: List[dict]) -> None:
        """Remove what a detector with more classes than the dataset found of the others."""
        labels = self._metadata.get("thing_dataset_id_to_contiguous_id")
        count = 0
        for image in predictions if labels else ():
            known = [x for x in image["instances"] if x["category_id"] < len(labels)]
            count += len(image["instances"]) - len(known)
            image["instances"] = known
        if count:
            logger.warning(
                f"{self._metadata.name}: left out {count} detections of classes that the dataset "
                f"does not have; it has {len(labels)}."
            )

    def _leave_out_boxes_without_mask(self) -> None:
        """Where masks are evaluated: COCO's metric needs one of every annotation."""
        content, name = self._coco_api.dataset, self._metadata.name
        if not any(a.get("segmentation") for a in content.get("annotations", [])):
            logger.warning(f"{name} has no segmentations: boxes are evaluated, and no masks.")
            self._tasks = ("bbox",)
        elif drop_without_segmentation(content, name):
            self._index()

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        coco_eval = coco_eval or _evaluate_nothing(self._coco_api, iou_type)
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        annotations = self._coco_api.anns.values()
        if iou_type == "bbox" and any("ambiguity" in annotation for annotation in annotations):
            subsets = {"AP-clean": False, "AP-ambiguous": True}
            extra = {name: subset_ap(coco_eval, flag) for name, flag in subsets.items()}
            self._logger.info("AP by ambiguity:\n" + create_small_table(extra))
            results.update(extra)
        return results


def _evaluate_nothing(truth: COCO, iou_type: str) -> COCOeval:
    """The evaluation of no detections at all, which Detectron2 leaves out."""
    nothing = COCO()
    nothing.dataset = {**truth.dataset, "annotations": []}
    with contextlib.redirect_stdout(io.StringIO()):
        nothing.createIndex()
        evaluation = FastestCOCOeval(truth, nothing, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def subset_ap(coco_eval: COCOeval, ambiguous: bool) -> float:
    """AP over the ambiguous or the clean instances, the others ignored.

    Args:
        coco_eval: a COCOeval, of either implementation, whose evaluate() has run.
        ambiguous: True for instances with "ambiguity" above 0, False for the rest.

    Returns:
        AP in [0, 100], the mean over classes and IoU thresholds; NaN where the subset is empty.
    """
    subset = _subset_class(type(coco_eval), ambiguous)
    evaluation = subset(coco_eval.cocoGt, coco_eval.cocoDt, coco_eval.params.iouType)
    evaluation.params = coco_eval.params
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    defined = precision[precision > -1]
    return float(defined.mean() * 100) if defined.size else float("nan")


def _subset_class(base: Type[COCOeval], ambiguous: bool) -> Type[COCOeval]:
    class SubsetCOCOeval(base):
        def _prepare(self):
            super()._prepare()  # sets "ignore" anew for crowds
            for annotation in self.cocoGt.anns.values():
                other = (annotation.get("ambiguity", 0) > 0) != ambiguous
                annotation["ignore"] = int(other or annotation["ignore"])

    return SubsetCOCOeval


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
