"""How well an audit finds errors that `planted_errors` planted."""

import json
from collections import defaultdict
from typing import Dict, List

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from detectron2.utils.file_io import PathManager

from .reliability import ranking_auc

#: Rows of a list that a user may well look through.
HEAD = 20
HIT_IOU = 0.5


def ranking_quality(score: np.ndarray, wanted: np.ndarray) -> Dict[str, float]:
    """How well a score puts wanted rows first.

    Args:
        score: (R,), larger is more suspicious.
        wanted: (R,) bool.

    Returns:
        "auc", the chance that a wanted row scores above another (0.5 is chance, NaN where one kind
        is absent); "precision_at_20"; "precision_at_count", among as many first rows as are wanted.
        Rows of equal score keep their order.
    """
    first = wanted[np.argsort(-score, kind="stable")]
    count = int(wanted.sum())
    return {
        "auc": ranking_auc(score, wanted),
        f"precision_at_{HEAD}": float(first[:HEAD].mean()) if len(first) else float("nan"),
        "precision_at_count": float(first[:count].mean()) if count else float("nan"),
    }


def measure_scores(scores: Dict[str, np.ndarray], planted: np.ndarray) -> List[dict]:
    """A row for each kind of planted error and each score: that kind against all other rows.

    Args:
        scores: name -> (R,).
        planted: (R,) "none", or the kind of error.
    """
    return [
        {
            "error": kind,
            "count": int((planted == kind).sum()),
            "score": name,
            **ranking_quality(score, planted == kind),
        }
        for kind in sorted(set(planted) - {"none"})
        for name, score in scores.items()
    ]


def measure_unannotated(unannotated: List[dict], records: List[dict], dataset: str) -> List[dict]:
    """One row: the list of unannotated objects against the annotations that were taken away.

    Args:
        unannotated: the list, most suspicious first, with "image" (position in `records`), "box".
        records: the dataset's dicts.
        dataset: its registered name; its file says what was taken away.

    Returns:
        "count" taken away and the precisions of `ranking_quality`; no row for a dataset without
        planted errors of this kind. There is no AUC: what is not detected has no score.
    """
    removed = _removed_boxes(dataset)
    count = sum(len(boxes) for boxes in removed.values())
    if count == 0:
        return []
    hits = []
    for row in unannotated:
        boxes = removed.get(records[row["image"]]["image_id"], [])
        iou = pairwise_iou(Boxes([row["box"]]), Boxes(torch.tensor(boxes).reshape(-1, 4)))
        hits.append(bool((iou >= HIT_IOU).any()))
    return [
        {
            "error": "missing",
            "count": count,
            "score": "unannotated",
            "auc": float("nan"),
            f"precision_at_{HEAD}": float(np.mean(hits[:HEAD])) if hits else 0.0,
            "precision_at_count": sum(hits[:count]) / count,
        }
    ]


def _removed_boxes(dataset: str) -> Dict:
    """Image id -> XYXY boxes of the annotations that were taken away."""
    path = MetadataCatalog.get(dataset).get("json_file")
    removed = defaultdict(list)
    if path:
        with PathManager.open(path, "rb") as stream:
            planted = json.loads(stream.read()).get("info", {}).get("planted_errors", [])
        for annotation in planted:
            if annotation["planted_error"] == "missing":
                box = BoxMode.convert(annotation["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
                removed[annotation["image_id"]].append(box)
    return removed
