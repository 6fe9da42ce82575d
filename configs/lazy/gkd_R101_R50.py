"""GlobalKD by LazyConfig: Faster R-CNN R101 -> R50 on COCO, without a registry or a cfg.

Everything that the YAML keys say is an argument here. Train it with Detectron2's own
`tools/lazyconfig_train_net.py`.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data.transforms import ResizeShortestEdge

from globalkd import (
    Distiller,
    DistillGeneralizedRCNN,
    PrototypeRefresher,
    build_teacher,
)
from globalkd.losses import FeatureKnowledge, GlobalKnowledge, ResponseKnowledge
from globalkd.prototype_refresh import GenerationSettings, ImageSource

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train
train.max_iter = 180000
train.init_checkpoint = (
    "detectron2://COCO-Detection/faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl"
)

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
for name in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(name)
model._target_ = DistillGeneralizedRCNN
model.distiller = L(Distiller)(
    teacher=L(build_teacher)(config_file="COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"),
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
        images_per_batch=16,
        refresh_epochs=1.0,
    ),
    decay="linear",
    max_iter=train.max_iter,
)
