"""The class names of a dataset, from the config that lists it or from Detectron2's catalog."""

import os
from typing import List

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .registration import read_categories


def class_names(cfg: CfgNode, dataset: str) -> List[str]:
    """Names in the order of their labels.

    The config's own DATASETS.COCO and DATASETS.VOC come first, where their files are there: in
    another config the same name may stand for other data, and a teacher's datasets need not be
    registered.

    Args:
        cfg: a config with the keys of `add_globalkd_config`.
        dataset: a name in its DATASETS.TRAIN or TEST.

    Returns:
        The names; empty where they are not known.
    """
    for name, json_file, _ in cfg.DATASETS.COCO:
        if name == dataset and os.path.isfile(json_file):
            return [category["name"] for category in read_categories(json_file)]
    for name, _, _, classes in cfg.DATASETS.VOC:
        if name == dataset:
            return list(classes)
    return list(MetadataCatalog.get(dataset).get("thing_classes", []))
