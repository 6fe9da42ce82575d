"""What prototypes were made with: the fingerprint that a prototype file carries.

Weights and COCO annotation files count by their content, so that weights trained again under the
same name, or annotations that were changed, are noticed, and a file that was moved is the same.
Other data (VOC folders, Detectron2's own) and configs count by their names. Not here: the file
format, and how two fingerprints are compared (`files`).
"""

import hashlib
import os
from typing import Any, Dict

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .settings import min_keypoints

#: Keys of MODEL.GLOBALKD.PROTOTYPES that say where prototypes lie or when they are made, not which.
_WITHOUT_EFFECT = ("FILE", "FEATURE_DIR", "REFRESH", "REFRESH_EPOCHS", "RESERVOIR_SIZE")
_WEIGHTS = ("teacher_weights", "student_weights")


def fingerprint_settings(cfg: CfgNode) -> Dict[str, Any]:
    """Everything in a config that decides which prototypes come out, files by their names."""
    node = cfg.MODEL.GLOBALKD
    return {
        "teacher_config": node.TEACHER.CONFIG_FILE,
        "teacher_weights": node.TEACHER.WEIGHTS,
        "teacher_opts": [str(x) for x in node.TEACHER.OPTS],
        "teacher_input_scale": node.TEACHER.INPUT_SCALE,
        "student_weights": cfg.MODEL.WEIGHTS,
        "inherit_teacher_heads": node.INHERIT_TEACHER_HEADS,
        "in_features": list(node.IN_FEATURES),
        "pooler_resolution": node.POOLER_RESOLUTION,
        "input": [cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST],
        "datasets": list(cfg.DATASETS.TRAIN),
        "filter_empty_annotations": cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        "mask_on": cfg.MODEL.MASK_ON,
        **({"min_keypoints": min_keypoints(cfg)} if cfg.MODEL.KEYPOINT_ON else {}),
        **{k.lower(): v for k, v in node.PROTOTYPES.items() if k not in _WITHOUT_EFFECT},
    }


def with_contents(settings: Dict[str, Any]) -> Dict[str, Any]:
    """The settings with the content of weights and annotation files in the place of their names."""
    result = dict(settings)
    for key in _WEIGHTS:
        if key in result:
            result[key] = _content(result[key])
    if "datasets" in result:
        result["datasets"] = {name: _dataset(name) for name in settings["datasets"]}
    return result


def _dataset(name: str) -> str:
    metadata = MetadataCatalog.get(name)
    path = metadata.get("json_file", "")
    return _content(path) if path else str(metadata.get("globalkd_source", name))


def _content(path: str) -> str:
    """A local file's SHA-256; of anything else the name."""
    if not os.path.isfile(path):
        return path
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return f"sha256 {digest.hexdigest()}"
