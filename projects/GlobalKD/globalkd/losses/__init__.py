"""The distillation losses; importing this package registers them all."""

from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .defeat import DeFeat
from .fbkd import FBKD
from .feature import FeatureKnowledge
from .feature_richness import FeatureRichness
from .fgfi import FGFI
from .fitnet import FitNet
from .gid import GID
from .global_knowledge import GlobalKnowledge
from .hinton import HintonKD
from .icd import ICD
from .instance_feature import InstanceFeature
from .instance_relation import InstanceRelation
from .outputs import Candidates, InstanceRows, Positives, Responses, StudentOutputs
from .pixel_relation import PixelRelation
from .rank_mimicking import PredictionGuidedImitation, RankMimicking
from .response import ResponseKnowledge
from .rkd import RKD

__all__ = [
    "DISTILL_LOSS_REGISTRY",
    "Candidates",
    "DeFeat",
    "DistillContext",
    "DistillLoss",
    "FBKD",
    "FGFI",
    "FeatureKnowledge",
    "FeatureRichness",
    "FitNet",
    "GID",
    "GlobalKnowledge",
    "HintonKD",
    "ICD",
    "InstanceFeature",
    "InstanceRelation",
    "InstanceRows",
    "PixelRelation",
    "Positives",
    "PredictionGuidedImitation",
    "RKD",
    "RankMimicking",
    "ResponseKnowledge",
    "Responses",
    "StudentOutputs",
]
