"""Reliability weights of a dataset's annotations, and how well they tell the ambiguous ones."""

from dataclasses import dataclass
from typing import Dict

import numpy as np
import torch
from torch import nn

from ..structures import PairedFeatures
from .annotations import dataset_annotations


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


def dataset_reliability(model: nn.Module, dataset: str) -> AnnotationReliability:
    """Reliability of every annotation of a registered dataset; see `dataset_annotations`.

    Args:
        model: a distilling meta-architecture with prototypes in its bank.
        dataset: a registered name.
    """
    annotations = dataset_annotations(model, dataset)
    return AnnotationReliability(
        features=annotations.features,
        reliability=level_reliability(model, annotations.features),
        ambiguity=annotations.field("ambiguity", np.nan).astype(float),
        kinds=annotations.field("ambiguity_kind", ""),
    )


def level_reliability(model: nn.Module, features: PairedFeatures) -> Dict[str, np.ndarray]:
    """Level -> (R,) omega of Eq. (8), with the prototypes in the model's bank."""
    device = next(model.parameters()).device
    bank = model.distiller.bank
    return {
        level: bank.reliability(
            level,
            features.teacher[level].to(device),
            features.student[level].to(device),
            features.classes.to(device),
        )
        .cpu()
        .numpy()
        for level in features.levels
    }


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
