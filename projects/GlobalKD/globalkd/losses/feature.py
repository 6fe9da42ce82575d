"""Local feature knowledge, Eq. (7) of GlobalKD: the teacher's maps, weighted inside boxes."""

from typing import Dict, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor

from ..features import LevelPair
from ..requirement import require
from ..sparse_convolution import convolve_cells
from .adapters import build_adapters
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .map_errors import cell_errors, weighted_feature_loss, weighted_mean
from .masks import instance_masks


@DISTILL_LOSS_REGISTRY.register()
class FeatureKnowledge(DistillLoss):
    """`loss_kd_feature`, and `loss_kd_background` outside the boxes; mean over levels.

    The paper's text has no background term; the authors' code weights it with 4.
    """

    node = "FEATURE"

    @configurable
    def __init__(
        self,
        *,
        weight: float = 1.0,
        background_weight: float = 0.0,
        adapter_kernel: int = 1,
        adapter_relu: bool = False,
        equal_boxes: bool = False,
        use_reliability: bool = True,
    ):
        """
        Args:
            weight: weight of the term inside boxes.
            background_weight: weight of the term outside boxes.
            adapter_kernel: side of the adapter's convolution, odd.
            adapter_relu: a ReLU after the adapter's convolution.
            equal_boxes: each instance has the same weight in all, shared by its cells; else each of
                its cells has, and large instances count for more.
            use_reliability: a cell's weight is the reliability of its instance; else 1.
        """
        weights = {"loss_kd_feature": weight, "loss_kd_background": background_weight}
        super().__init__(weights, use_reliability=use_reliability)
        odd = adapter_kernel > 0 and adapter_kernel % 2 == 1
        require("FEATURE.ADAPTER_KERNEL", adapter_kernel, odd, "odd")
        self.adapter_kernel = adapter_kernel
        self.adapter_relu = adapter_relu
        self.equal_boxes = equal_boxes

    def attach(self, levels: Sequence[LevelPair]) -> None:
        self.adapters = build_adapters(
            levels, kernel_size=self.adapter_kernel, relu=self.adapter_relu
        )

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        names = [pair.student for pair in context.levels]
        masks = instance_masks(self, context, share=self.equal_boxes)
        errors = self._dense if self._whole_maps(context) else self._inside
        terms = [errors(context, name, mask) for name, mask in zip(names, masks)]
        return {name: torch.stack([x[name] for x in terms]).mean() for name in self.weights}

    def _whole_maps(self, context: DistillContext) -> bool:
        """Whether the adapters run on every cell.

        They must for the background. On a GPU, too: there the choice of cells would make the host
        wait for the device on each level.
        """
        return "loss_kd_background" in self.weights or context.instances.boxes.is_cuda

    def _dense(self, context: DistillContext, name: str, mask: Tensor) -> Dict[str, Tensor]:
        student = self.adapters[name](context.student_maps[name])
        errors = cell_errors(student, context.teacher_maps[name])
        return {
            k: weighted_mean(errors, mask if k == "loss_kd_feature" else (mask == 0).float())
            for k in self.weights
        }

    def _inside(self, context: DistillContext, name: str, mask: Tensor) -> Dict[str, Tensor]:
        """The term inside boxes from their cells alone."""
        cells = mask.nonzero()
        image, y, x = cells.unbind(dim=1)
        adapter = self.adapters[name]
        conv = adapter[0] if self.adapter_relu else adapter
        student = convolve_cells(conv, context.student_maps[name], cells)
        student = student.relu() if self.adapter_relu else student
        teacher = context.teacher_maps[name].permute(0, 2, 3, 1)[image, y, x]
        return {"loss_kd_feature": weighted_feature_loss(student, teacher, mask[image, y, x])}
