"""The class names of a dataset, from the config that lists it or from Detectron2's catalog."""

import os
from typing import List

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .coco_files import read_categories
from .registration import coco_entry, voc_entry


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

    Raises:
        ValueError: an entry of DATASETS.COCO or DATASETS.VOC has another form.
    """
    for name, json_file, _ in map(coco_entry, cfg.DATASETS.COCO):
        if name == dataset and os.path.isfile(json_file):
            return [category["name"] for category in read_categories(json_file)]
    for name, _, _, classes in map(voc_entry, cfg.DATASETS.VOC):
        if name == dataset:
            return classes
    return list(MetadataCatalog.get(dataset).get("thing_classes", []))
