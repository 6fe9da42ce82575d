"""GlobalKD by LazyConfig: Faster R-CNN R101 -> R50 on COCO, without a registry or a cfg.

Everything that the YAML keys say is an argument here and in `common.py`. Train it with Detectron2's
own `tools/lazyconfig_train_net.py`.
"""

from detectron2 import model_zoo

from globalkd import DistillGeneralizedRCNN

from .common import dataloader, lr_multiplier, make_distiller, optimizer, train  # noqa: F401

train.init_checkpoint = (
    "detectron2://COCO-Detection/faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl"
)

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
for name in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(name)
model._target_ = DistillGeneralizedRCNN
model.distiller = make_distiller("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml")
