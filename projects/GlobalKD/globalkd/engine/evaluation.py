"""The evaluator of a dataset, chosen by its metadata.

Not here: the metrics (`coco_evaluation`, `voc_evaluation`), loading (`data/`) and the loop over a
dataset (`detectron2.evaluation.inference_on_dataset`).
"""

import os
from typing import Optional

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator

from .coco_evaluation import FastCOCOEvaluator
from .voc_evaluation import VOCFolderEvaluator


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
