"""The distillation losses; importing this package registers them all."""

from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .cross_kd import CrossKD
from .cwd import CWD
from .defeat import DeFeat
from .dkd import DKD
from .fbkd import FBKD
from .feature import FeatureKnowledge
from .feature_richness import FeatureRichness
from .fgd import FGD
from .fgfi import FGFI
from .fitnet import FitNet
from .gid import GID
from .global_knowledge import GlobalKnowledge
from .hinton import HintonKD
from .icd import ICD
from .instance_feature import InstanceFeature
from .instance_relation import InstanceRelation
from .mgd import MGD
from .outputs import Candidates, InstanceRows, Positives, Responses, StudentOutputs
from .pixel_relation import PixelRelation
from .pkd import PKD
from .rank_mimicking import PredictionGuidedImitation, RankMimicking
from .response import ResponseKnowledge
from .review_kd import ReviewKD
from .rkd import RKD

__all__ = [
    "DISTILL_LOSS_REGISTRY",
    "CWD",
    "Candidates",
    "CrossKD",
    "DKD",
    "DeFeat",
    "DistillContext",
    "DistillLoss",
    "FBKD",
    "FGD",
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
    "MGD",
    "PKD",
    "PixelRelation",
    "Positives",
    "PredictionGuidedImitation",
    "RKD",
    "RankMimicking",
    "ResponseKnowledge",
    "Responses",
    "ReviewKD",
    "StudentOutputs",
]
