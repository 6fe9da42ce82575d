"""What must hold of the datasets that a config names, before anything is trained or evaluated.

Here: names that are registered, class lists that agree with each other, with the detector and with
the teacher, test sets with images, image files that are there. A mistake found by these takes
seconds; most of them would otherwise end a run at its first evaluation, or end none and falsify its
results. Not here: the content of a file of annotations (`coco_checks`, `voc`).
"""

import difflib
import logging
import math
import os
from collections.abc import Sized
from itertools import zip_longest
from typing import Dict, List, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN, RetinaNet
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n

from .class_names import class_names
from .coco_files import read_file_names

logger = logging.getLogger(__name__)

_SHOWN = 5
#: Image files of a dataset that are looked for before a run; a second, where a look takes 0.5 ms.
FILES_LOOKED_FOR = 2000


def check_data(cfg: CfgNode, *, train: bool = True) -> None:
    """Check the datasets of DATASETS.TRAIN and DATASETS.TEST before a run.

    Reads every test set once, so that an error in its annotations ends the run here and not at the
    first evaluation; one of COCO val's size takes two seconds. Training sets are not read: the
    training loader is about to do it. Of the image files of either, some are looked for.

    Args:
        cfg: a complete config whose datasets are registered.
        train: False for an evaluation alone: DATASETS.TRAIN need not be there, and is compared
            where its classes can be read; test sets are not read beforehand.

    Raises:
        ValueError: a name is not registered, class lists differ, the detector has fewer classes
            than the data, or a test set is empty or wrong in itself.
        FileNotFoundError: a test set lacks a file of annotations; or more image files are missing
            than DATALOADER.MAX_UNREADABLE_IMAGES.
    """
    keys = ("TRAIN", "TEST") if train else ("TEST",)
    used = [(name, f"DATASETS.{key}") for key in keys for name in cfg.DATASETS[key]]
    for name, key in used:
        check_registered(name, key)
    for name in cfg.DATASETS.TEST if train else ():
        records = DatasetCatalog.get(name)
        if isinstance(records, Sized):  # an iterable dataset does not know its length
            require_images(len(records), name)
            if MetadataCatalog.get(name).get("evaluator_type", "coco") == "coco":
                require_integer_ids([record.get("image_id") for record in records], name)
    if train:
        _check_tasks(cfg)
    check_classes(cfg)
    check_num_classes(cfg)
    for name, key in used:
        require_image_files(name, key, most=cfg.DATALOADER.MAX_UNREADABLE_IMAGES)


def _check_tasks(cfg: CfgNode) -> None:
    """Raise a ValueError where masks or keypoints are to be learnt from data without any."""
    voc = [n for n in cfg.DATASETS.TRAIN if MetadataCatalog.get(n).get("dirname")]
    for key, what in (("MASK_ON", "masks"), ("KEYPOINT_ON", "keypoints")):
        if voc and cfg.MODEL[key]:
            raise ValueError(
                f"MODEL.{key} is True, but DATASETS.TRAIN: '{voc[0]}' is in VOC format, which has "
                f"no {what}. Set it to False."
            )


def check_registered(name: str, key: str) -> None:
    """Raise a ValueError with the nearest name where no dataset of this name is registered."""
    if name in DatasetCatalog:
        return
    near = difflib.get_close_matches(name, DatasetCatalog.list(), n=1)
    raise ValueError(
        f"{key} names '{name}', which is not registered: neither in DATASETS.COCO or DATASETS.VOC "
        f"nor one of Detectron2's own." + "".join(f" Did you mean '{other}'?" for other in near)
    )


def require_images(count: int, name: str) -> None:
    """Raise a ValueError where a test set has no images."""
    if not count:
        raise ValueError(f"DATASETS.TEST: '{name}' has no images to evaluate on")


def require_image_files(name: str, key: str, *, most: int) -> None:
    """Look for image files of a COCO dataset: at most `FILES_LOOKED_FOR`, evenly spaced.

    A wrong folder would otherwise end a run at its first evaluation. VOC folders are listed when
    they are loaded; of other kinds of datasets it is not known what their file names mean.

    Raises:
        FileNotFoundError: more than `most` are missing.
    """
    metadata = MetadataCatalog.get(name)
    json_file, folder = metadata.get("json_file"), metadata.get("image_root")
    if metadata.get("evaluator_type") != "coco" or not json_file or not folder:
        return
    if "://" in folder:  # on a server, where each look may take long
        return
    names = read_file_names(json_file)
    names = names[:: math.ceil(len(names) / FILES_LOOKED_FOR) or 1]
    files = [os.path.join(folder, name) for name in names]
    missing = [file for file in files if not os.path.isfile(file)]
    if len(missing) > most:
        raise FileNotFoundError(
            f"{key}: '{name}': {len(missing)} of {len(files)} image files looked for are missing, "
            f"such as {missing[0]}; DATALOADER.MAX_UNREADABLE_IMAGES is {most}."
        )


def require_integer_ids(ids: Sequence, name: str) -> None:
    """Raise a ValueError where COCO's metric could not tell the images of a test set apart."""
    strange = [x for x in ids if not isinstance(x, int)]
    if strange:
        shown = ", ".join(repr(x) for x in strange[:_SHOWN])
        raise ValueError(
            f"DATASETS.TEST: '{name}' has {len(strange)} image ids that are no integers ({shown}); "
            "COCO's metric takes no others."
        )


def check_classes(cfg: CfgNode, teacher_classes: Sequence[str] = (), *, test: bool = True) -> None:
    """Compare the class names of the training data, the test data and the teacher.

    A label is a place in the list, so that names and order must be equal. Lists that are not known
    are not compared.

    Args:
        teacher_classes: the teacher's names; empty: not known, or no teacher.
        test: whether to compare the test data.

    Raises:
        ValueError: those of the data differ; or the teacher's is another one, and
            MODEL.GLOBALKD.TEACHER.ALLOW_OTHER_CLASSES is not set.
    """
    lists = _known_classes(cfg, (*cfg.DATASETS.TRAIN, *(cfg.DATASETS.TEST if test else ())))
    if _differ(lists):
        raise ValueError(
            f"The class lists of DATASETS.TRAIN and DATASETS.TEST differ: {_described(lists)}. A "
            "label is a place in the list (of a COCO JSON, by category id): give all of them the "
            "same classes in the same order."
        )
    if teacher_classes:
        lists["the teacher"] = list(teacher_classes)
    if not _differ(lists):
        return
    problem = f"The class lists differ: {_described(lists)}"
    if not cfg.MODEL.GLOBALKD.TEACHER.ALLOW_OTHER_CLASSES:
        wanted = next(iter(lists.values()))
        remedy = "Set MODEL.GLOBALKD.TEACHER.ALLOW_OTHER_CLASSES True if that is meant."
        if set(wanted) <= set(teacher_classes):
            remedy = (
                "The teacher knows all classes of the data: set MODEL.GLOBALKD.TEACHER.CLASSES to "
                f"{list(wanted)}, or ALLOW_OTHER_CLASSES True if its list of names is wrong."
            )
        raise ValueError(f"{problem}. {remedy}")
    if comm.is_main_process():
        log_first_n(
            logging.WARNING,
            f"{problem}. Going on: ALLOW_OTHER_CLASSES is True.",
            name=__name__,
            key="message",
        )


def check_num_classes(cfg: CfgNode) -> None:
    """Compare the number of classes of the data with the detector's; fewer give a warning.

    Raises:
        ValueError: a dataset has more classes.
    """
    key, num_classes = detector_classes(cfg)
    known = _known_classes(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    counts = {owner: len(names) for owner, names in known.items()}
    for owner, count in counts.items():
        if num_classes is not None and count > num_classes:
            raise ValueError(
                f"{owner} has {count} classes, but {key} is {num_classes}. To the detector, label "
                f"{num_classes} is background. Set {key} {count}."
            )
    fewer = [owner for owner, count in counts.items() if count < (num_classes or 0)]
    if fewer and comm.is_main_process():
        logger.warning(
            f"{fewer[0]} has {counts[fewer[0]]} classes, {key} is {num_classes}: some outputs are "
            "unused."
        )


def detector_classes(cfg: CfgNode) -> Tuple[str, Optional[int]]:
    """The key of the detector's number of classes, and the number; None for other detectors."""
    name = cfg.MODEL.META_ARCHITECTURE
    kind = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    if isinstance(kind, type) and issubclass(kind, RetinaNet):
        return "MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES
    if isinstance(kind, type) and issubclass(kind, GeneralizedRCNN):
        return "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    return "", None


def _known_classes(cfg: CfgNode, datasets: Sequence[str]) -> Dict[str, List[str]]:
    known = {}
    for name in datasets:
        if name in DatasetCatalog:
            classes = MetadataCatalog.get(name).get("thing_classes", [])
        else:  # in an evaluation alone, a training set of which the JSON may be here
            try:
                classes = class_names(cfg, name)
            except ValueError:
                classes = []
        if classes:
            known[f"dataset {name}"] = list(classes)
    return known


def _differ(lists: Dict[str, List[str]]) -> bool:
    return len({tuple(names) for names in lists.values()}) > 1


def _described(lists: Dict[str, List[str]]) -> str:
    """The lists' lengths and first names, and where they first differ if these do not show it."""
    parts = [
        f"{owner} has {len(names)}: "
        f"{', '.join(map(str, names[:_SHOWN]))}{', ...' if names[_SHOWN:] else ''}"
        for owner, names in lists.items()
    ]
    rows = enumerate(zip_longest(*lists.values(), fillvalue="nothing"))
    place, row = next((i, row) for i, row in rows if len(set(row)) > 1)
    if place >= _SHOWN:
        parts.append(f"label {place} is {', '.join(map(str, row))}")
    return "; ".join(parts)
