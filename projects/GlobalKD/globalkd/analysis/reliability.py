"""Reliability weights of a dataset's annotations, and how well they tell the ambiguous ones."""

from dataclasses import dataclass
from typing import Dict

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from torch import nn

from ..extraction import (
    ExtractionMapper,
    choose_images,
    extract_features,
    extraction_records,
    usable_boxes,
)
from ..structures import PairedFeatures


@dataclass
class AnnotationReliability:
    """One row for each annotation that was pooled.

    Attributes:
        features: the paired features and where each row comes from.
        reliability: level -> (R,) omega of Eq. (8).
        ambiguity: (R,) how ambiguous the dataset says it is; NaN where it does not say.
        kinds: (R,) what makes it ambiguous, in words; empty where the dataset does not say.
    """

    features: PairedFeatures
    reliability: Dict[str, np.ndarray]
    ambiguity: np.ndarray
    kinds: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(R,) mean over levels."""
        return np.mean(list(self.reliability.values()), axis=0)


def dataset_reliability(
    model: nn.Module, dataset: str, *, augmentations=()
) -> AnnotationReliability:
    """Reliability of every annotation of a registered dataset.

    Args:
        model: a distilling meta-architecture with prototypes in its bank.
        dataset: a registered name.
        augmentations: how images are resized; none by default.
    """
    distiller = model.distiller
    dicts = DatasetCatalog.get(dataset)
    table = usable_boxes(dicts, 1.0)
    images = choose_images(table, max_images_per_class=0, seed=0)
    features = extract_features(
        model,
        distiller.teacher,
        extraction_records(dicts, table, images),
        levels=distiller.levels,
        pooler=distiller.pooler,
        mapper=ExtractionMapper(augmentations, distiller.input_format),
        input_format=distiller.input_format,
    )
    device = next(model.parameters()).device
    reliability = {
        level: distiller.bank.reliability(
            level,
            features.teacher[level].to(device),
            features.student[level].to(device),
            features.classes.to(device),
        )
        for level in features.levels
    }
    rows = [
        dicts[i]["annotations"][a]
        for i, a in zip(features.image_ids.tolist(), features.annotation_ids.tolist())
    ]
    return AnnotationReliability(
        features=features,
        reliability={level: w.cpu().numpy() for level, w in reliability.items()},
        ambiguity=np.array([r.get("ambiguity", np.nan) for r in rows], dtype=float),
        kinds=np.array([r.get("ambiguity_kind", "") for r in rows]),
    )


def ambiguity_auc(score: np.ndarray, ambiguous: np.ndarray) -> float:
    """Probability that an ambiguous row scores below a clean one; 0.5 is chance.

    Args:
        score: (R,) reliability.
        ambiguous: (R,) bool.

    Returns:
        Area under the ROC curve, ties counted half; NaN if one kind is absent.
    """
    low, high = score[ambiguous], score[~ambiguous]
    if len(low) == 0 or len(high) == 0:
        return float("nan")
    order = torch.as_tensor(np.sort(high))
    low = torch.as_tensor(low)
    above = len(high) - torch.searchsorted(order, low, right=True)
    equal = torch.searchsorted(order, low, right=True) - torch.searchsorted(order, low)
    return float((above + 0.5 * equal).double().sum() / (len(low) * len(high)))
