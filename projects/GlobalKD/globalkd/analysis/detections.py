"""Detections of a detector on images of a registered dataset, and the annotations beside them."""

from typing import List

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import Instances
from torch import nn
from tqdm import tqdm


@torch.no_grad()
def detect(
    model: nn.Module,
    cfg: CfgNode,
    records: List[dict],
    *,
    threshold: float,
    input_format: str = "",
    name: str = "detections",
) -> List[Instances]:
    """What a detector finds in each image.

    Args:
        model: a detector in evaluation mode.
        cfg: how images are read and resized.
        records: dataset dicts.
        threshold: the least score.
        input_format: channel order of the detector's images; empty: as `cfg` says.
        name: for the progress bar.

    Returns:
        One `Instances` a record, on the CPU, in pixels of the original image.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.FORMAT = input_format or cfg.INPUT.FORMAT
    loader = build_detection_test_loader(records, mapper=DatasetMapper(cfg, is_train=False))
    found = []
    for batch in tqdm(loader, desc=name, unit="image", disable=None):
        for output in model(batch):
            instances = output["instances"].to("cpu")
            found.append(instances[instances.scores >= threshold])
    return found


def annotated_instances(record: dict) -> Instances:
    """A record's annotations: gt_boxes, gt_classes, and `ignored` (crowds and difficult ones)."""
    annotations = [
        {key: annotation[key] for key in ("bbox", "bbox_mode", "category_id")}
        for annotation in record["annotations"]
    ]
    result = annotations_to_instances(annotations, (record["height"], record["width"]))
    result.ignored = torch.tensor(
        [bool(a.get("iscrowd") or a.get("difficult")) for a in record["annotations"]],
        dtype=torch.bool,
    )
    return result
