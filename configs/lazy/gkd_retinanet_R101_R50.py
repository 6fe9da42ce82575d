"""GlobalKD by LazyConfig: RetinaNet R101 -> R50 on COCO."""

from detectron2 import model_zoo

from globalkd import DistillRetinaNet

from .common import dataloader, lr_multiplier, make_distiller, optimizer, train  # noqa: F401

optimizer.lr = 0.01
train.init_checkpoint = (
    "detectron2://COCO-Detection/retinanet_R_50_FPN_1x/190397773/model_final_bfca0b.pkl"
)

model = model_zoo.get_config("common/models/retinanet.py").model
model.backbone.bottom_up.freeze_at = 2
model._target_ = DistillRetinaNet
model.distiller = make_distiller("COCO-Detection/retinanet_R_101_FPN_3x.yaml")
