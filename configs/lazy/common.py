"""What the two LazyConfig examples share: data, schedule, and the distiller but for its teacher."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data.transforms import ResizeShortestEdge

from globalkd import Distiller, PrototypeRefresher, build_teacher
from globalkd.losses import FeatureKnowledge, GlobalKnowledge, ResponseKnowledge
from globalkd.prototypes.settings import GenerationSettings, ImageSource

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train
train.max_iter = 180000


def make_distiller(teacher):
    """GlobalKD's three terms, from a teacher by its config file or model-zoo name."""
    return L(Distiller)(
        teacher=L(build_teacher)(config_file=teacher),
        losses=[
            L(GlobalKnowledge)(weight=5.0),
            L(FeatureKnowledge)(weight=1.0),
            L(ResponseKnowledge)(weight=1.0),
        ],
        refresher=L(PrototypeRefresher)(
            source=L(ImageSource)(
                datasets=["coco_2017_train"],
                augmentations=[L(ResizeShortestEdge)(short_edge_length=[800, 800], max_size=1333)],
                num_workers=4,
            ),
            generation=L(GenerationSettings)(num_prototypes=10, lam=10.0),
            images_per_batch="${dataloader.train.total_batch_size}",
            refresh_epochs=1.0,
        ),
        decay="linear",
        max_iter="${train.max_iter}",
    )
