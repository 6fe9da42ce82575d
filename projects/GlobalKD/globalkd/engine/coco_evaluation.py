"""COCO metrics by faster-coco-eval, equal to pycocotools', and AP of ambiguous instances apart."""

import contextlib
import copy
import io
import logging
import math
from typing import Any, Dict, List, Type
from unittest import mock

from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation import coco_evaluation as detectron2_coco
from detectron2.utils.logger import create_small_table
from faster_coco_eval import COCOeval_faster as FasterCOCOeval
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.coco_checks import check_crowds, drop_without_segmentation
from ..data.coco_files import COCOFile
from ..data.config_checks import require_images, require_integer_ids

logger = logging.getLogger(__name__)

#: From here on not every integer is a double.
_EXACT = 2**53


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator with a fast COCOeval and AP by ambiguity.

    Where annotations carry "ambiguity", the results' "bbox" has two more numbers: "AP-clean"
    (instances of ambiguity 0) and "AP-ambiguous" (the others). Instances of the other subset are
    ignored: neither they nor detections matched to them count. A model that detects nothing has AP
    0. NaN stands for what the dataset does not define, such as AP of a class without instances.
    Annotations may have ids of any kind. An area that is missing or no number is that of the box.
    """

    def __init__(self, dataset_name: str, **kwargs):
        # What an earlier run converted to COCO's format may be of other data.
        kwargs.setdefault("allow_cached_coco", False)
        with mock.patch.object(detectron2_coco, "COCO", COCOFile):
            super().__init__(dataset_name, use_fast_impl=False, **kwargs)
        require_images(len(self._coco_api.imgs), dataset_name)
        require_integer_ids(list(self._coco_api.imgs), dataset_name)
        self._use_fast_impl = True
        annotations = self._coco_api.dataset.get("annotations", [])
        try:
            check_crowds(annotations)
        except ValueError as error:
            raise ValueError(f"DATASETS.TEST: '{dataset_name}': {error}") from error
        fill_areas(annotations, dataset_name)
        # COCOeval takes a match with id 0 for none, and text for no id; this is our own copy.
        for number, annotation in enumerate(annotations, 1):
            annotation["id"] = number
            annotation.setdefault("iscrowd", 0)  # many files lack this
        self._index()

    def _index(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco_api.createIndex()

    def _eval_predictions(self, predictions, img_ids=None):
        self._leave_out_other_classes(predictions)
        if any("segmentation" in x for image in predictions for x in image["instances"]):
            self._leave_out_boxes_without_mask()
        # Detectron2 takes its fast COCOeval from a module variable; exchanged for this call only.
        with mock.patch.object(detectron2_coco, "COCOeval_opt", _Evaluation):
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


class _Evaluation(FasterCOCOeval):
    """faster-coco-eval for image ids of any size; by itself it reads them as doubles."""

    def __init__(self, truth: COCO, found: COCO, iou_type: str):
        if any(abs(image) >= _EXACT for image in truth.imgs):
            numbers = {image: number for number, image in enumerate(sorted(truth.imgs), 1)}
            truth, found = _renumbered(truth, numbers), _renumbered(found, numbers)
        super().__init__(truth, found, iou_type)


def _renumbered(coco: COCO, numbers: Dict[int, int]) -> COCO:
    """The same with other ids for its images."""
    images, annotations = (coco.dataset.get(key, []) for key in ("images", "annotations"))
    renumbered = copy.copy(coco)  # of the same class; its index is made anew
    renumbered.dataset = {
        **coco.dataset,
        "images": [{**x, "id": numbers[x["id"]]} for x in images],
        "annotations": [{**x, "image_id": numbers[x["image_id"]]} for x in annotations],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        renumbered.createIndex()
    return renumbered


def fill_areas(annotations: List[dict], name: str) -> None:
    """Give each annotation without an area that of its box, in place.

    Many files lack areas. One that is there and no number gives a warning that counts them: it
    would put its object into no size, or a wrong one, of APs, APm and APl.
    """
    strange = 0
    for annotation in annotations:
        area = annotation.setdefault("area", None)
        if not _is_number(area):
            strange += area is not None
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    if strange:
        logger.warning(
            f"{name}: {strange} annotations have an area that is no number; that of their box is "
            "taken."
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _evaluate_nothing(truth: COCO, iou_type: str) -> COCOeval:
    """The evaluation of no detections at all, which Detectron2 leaves out."""
    nothing = COCO()
    nothing.dataset = {**truth.dataset, "annotations": []}
    with contextlib.redirect_stdout(io.StringIO()):
        nothing.createIndex()
        evaluation = _Evaluation(truth, nothing, iou_type)
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
