"""General instances: boxes on which teacher and student disagree most.

"General Instance Distillation for Object Detection", Dai et al., CVPR 2021 (GID).

Shapes: N images, A anchors of an image over all levels, C classes (1 for an RPN), G general
instances of a batch, D channels.
"""

from typing import Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from ..dense_head import DenseOutputs, convert_deltas
from ..features import LevelPair, pool
from ..pairing import UnfitLosses
from ..requirement import require
from .adapters import build_adapters
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .divergence import sigmoid_kl
from .rkd import distance_loss

#: Anchors of an image that take part in the non-maximum suppression, by their score.
BEFORE_NMS = 3000


@torch.no_grad()
def general_instances(
    student: DenseOutputs,
    teacher: DenseOutputs,
    image_sizes: Sequence[Tuple[int, int]],
    *,
    num_instances: int,
    nms_threshold: float,
    min_box_size: float = 0.0,
) -> Tensor:
    """The general instance selection module (GISM).

    An anchor's score is the largest difference of a class probability between the detectors; its
    box is that of the detector with the larger probability. Overlapping ones are suppressed.

    Args:
        student, teacher: what the dense heads say of the same anchors.
        image_sizes: (height, width) of each image.
        num_instances: at most so many of an image.
        nms_threshold: IoU above which the lower score is suppressed.
        min_box_size: boxes with a side below it, inside their image, are none.

    Returns:
        (G, 5) rows of image index, ascending, and XYXY_ABS box.
    """
    scores, trusts = [], []
    for ours, theirs in zip(student.logits.values(), teacher.logits.values()):
        ours, theirs = ours.float().sigmoid(), theirs.float().sigmoid()
        trusts.append((theirs.amax(dim=-1) > ours.amax(dim=-1)).flatten(1))
        scores.append(theirs.sub_(ours).abs_().amax(dim=-1).flatten(1))
    score = torch.cat(scores, dim=1)
    score, index = score.topk(min(BEFORE_NMS, score.shape[1]), dim=1)  # (N, k)
    trusted = torch.cat(trusts, dim=1).gather(1, index)
    boxes = torch.where(trusted[..., None], _decode(teacher, index), _decode(student, index))
    sizes = torch.tensor([(w, h, w, h) for h, w in image_sizes]).to(boxes, non_blocking=True)
    boxes = boxes.clamp_min(0).minimum(sizes[:, None]).flatten(0, 1)
    large = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) >= max(min_box_size, 1e-3)
    score = score.flatten().masked_fill(~large, -1)  # last: what is too small suppresses nothing
    image = torch.arange(len(index), device=index.device).repeat_interleave(index.shape[1])
    kept = batched_nms(boxes, score, image, nms_threshold)  # best first
    kept = kept[large[kept]]
    rank = F.one_hot(image[kept], len(index)).cumsum(dim=0).gather(1, image[kept][:, None])
    kept = kept[rank.squeeze(1) <= num_instances].sort().values
    return torch.cat([image[kept][:, None].to(boxes), boxes[kept]], dim=1)


def _decode(outputs: DenseOutputs, index: Tensor) -> Tensor:
    """Predicted boxes of the anchors with the given (N, k) indices: (N, k, 4)."""
    deltas = outputs.flat_deltas.gather(1, index[..., None].expand(-1, -1, 4)).float()
    anchors = outputs.flat_anchors[index]
    boxes = outputs.transform.apply_deltas(deltas.flatten(0, 1), anchors.flatten(0, 1))
    return boxes.view_as(anchors)


@torch.no_grad()
def anchors_at(rois: Tensor, anchors: Tensor, *, num_images: int, threshold: float) -> Tensor:
    """(N, A) bool: anchors whose IoU with a (G, 5) row of their image is at least `threshold`."""
    overlaps = box_iou(rois[:, 1:], anchors)
    image = rois[:, :1].long().expand_as(overlaps)
    best = overlaps.new_zeros(num_images, len(anchors))
    return best.scatter_reduce(0, image, overlaps, "amax") >= threshold


@DISTILL_LOSS_REGISTRY.register()
class GID(DistillLoss):
    """`loss_kd_gid_feature`, `_relation`, `_class` and `_box`.

    On the features that RoIAlign gives for the general instances: squared difference after a 3x3
    convolution a level, mean over instances, channels and bins; RKD-D between the batch's
    instances. On the anchors that the instances cover: binary KL of the class scores (summed over
    classes) and L1 of the box predictions (summed over 4), mean over those anchors.

    The dense heads are compared: RetinaNet's, or the class-agnostic RPN of a two-stage detector.

    Defaults: those of the first author's Detectron2 code (RetinaNet R101 to R50): K = 10 of the
    3000 highest scores, sides of at least 10 px, NMS at 0.3, RoIAlign 10 x 10, weights 40
    (relations), 0.1 (classes) and 1 (boxes). Its 5e-4 for features is of a sum over channels, 5e-4
    x 256 = 0.128 of their mean.

    Note: that code scores an anchor by the difference of both detectors' largest probabilities,
    whichever classes they are of; here it is the largest difference within a class, as in the
    paper, which chooses other anchors where there are several classes. It makes the student's 3x3
    adapter (one for all levels) and never applies it, counts the best anchor of an instance below
    the threshold, too, leaves relations out below three instances, and has no two-stage detector.
    Its mean over pairs leaves out the diagonal, which is 0.

    Note: general instances have no annotated class, and with it no prototypes: there is no
    reliability to weigh them with.
    """

    node = "GID"
    reads = frozenset({"student_dense", "teacher_dense"})
    compares_classes = True  # instances are chosen by it, whatever the weights are

    @configurable
    def __init__(
        self,
        *,
        feature_weight: float = 0.128,
        relation_weight: float = 40.0,
        class_weight: float = 0.1,
        box_weight: float = 1.0,
        num_instances: int = 10,
        nms_threshold: float = 0.3,
        min_box_size: float = 10.0,
        anchor_threshold: float = 0.5,
        pooler_resolution: int = 10,
    ):
        """
        Args:
            feature_weight: weight of the features.
            relation_weight: weight of their relations.
            class_weight: weight of the class predictions.
            box_weight: weight of the box predictions.
            num_instances: K, general instances of an image.
            nms_threshold: IoU at which instances suppress each other.
            min_box_size: least side of an instance in pixels of the input.
            anchor_threshold: IoU from which on an anchor belongs to an instance.
            pooler_resolution: bins per side of RoIAlign.
        """
        weights = {
            "loss_kd_gid_feature": feature_weight,
            "loss_kd_gid_relation": relation_weight,
            "loss_kd_gid_class": class_weight,
            "loss_kd_gid_box": box_weight,
        }
        super().__init__(weights)
        for key, value, right, needed in (
            ("NUM_INSTANCES", num_instances, num_instances >= 1, "1 or more"),
            ("NMS_THRESHOLD", nms_threshold, 0 <= nms_threshold <= 1, "in [0, 1]"),
            ("ANCHOR_THRESHOLD", anchor_threshold, 0 < anchor_threshold <= 1, "in (0, 1]"),
            ("POOLER_RESOLUTION", pooler_resolution, pooler_resolution >= 1, "1 or more"),
        ):
            require(f"GID.{key}", value, right, needed)
        self.num_instances = num_instances
        self.nms_threshold = nms_threshold
        self.min_box_size = min_box_size
        self.anchor_threshold = anchor_threshold
        self.pooler_resolution = pooler_resolution

    def attach(self, levels: Sequence[LevelPair]) -> None:
        strides = [p.stride for p in levels]
        if any(b != 2 * a for a, b in zip(strides, strides[1:])):
            raise UnfitLosses(
                ["GID"],
                "pool from levels whose strides double, but MODEL.GLOBALKD.IN_FEATURES is "
                f"{[p.student for p in levels]}, of strides {strides}.",
            )
        if "loss_kd_gid_feature" in self.weights:
            self.adapters = build_adapters(levels, kernel_size=3, relu=False)
        self.pooler = ROIPooler(
            output_size=self.pooler_resolution,
            scales=[1.0 / p.stride for p in levels],
            sampling_ratio=2,
            pooler_type="ROIAlignV2",
        )

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        rois = general_instances(
            context.student_dense,
            context.teacher_dense,
            context.image_sizes,
            num_instances=self.num_instances,
            nms_threshold=self.nms_threshold,
            min_box_size=self.min_box_size,
        )
        return {**self._feature_terms(context, rois), **self._response_terms(context, rois)}

    def _feature_terms(self, context: DistillContext, rois: Tensor) -> Dict[str, Tensor]:
        """Squared difference of adapted features, and of the relations of raw ones."""
        names = [p.student for p in context.levels]
        terms: Dict[str, Tensor] = {}
        if not {"loss_kd_gid_feature", "loss_kd_gid_relation"} & set(self.weights):
            return terms
        teacher = self._pool([context.teacher_maps[n] for n in names], rois)
        if "loss_kd_gid_feature" in self.weights:
            adapted = self._pool([self.adapters[n](context.student_maps[n]) for n in names], rois)
            squared = (adapted - teacher).square()
            terms["loss_kd_gid_feature"] = squared.sum() / max(squared.numel(), 1)
        if "loss_kd_gid_relation" in self.weights:
            student = self._pool([context.student_maps[n] for n in names], rois)
            with torch.autocast(student.device.type, enabled=False):
                terms["loss_kd_gid_relation"] = distance_loss(
                    student.flatten(1), teacher.flatten(1)
                )
        return terms

    def _pool(self, maps: List[Tensor], rois: Tensor) -> Tensor:
        """(G, D, bins, bins) float32."""
        return pool(self.pooler, [x.float() for x in maps], rois)

    def _response_terms(self, context: DistillContext, rois: Tensor) -> Dict[str, Tensor]:
        """Class and box predictions of the anchors at the general instances."""
        if not {"loss_kd_gid_class", "loss_kd_gid_box"} & set(self.weights):
            return {}
        ours, theirs = context.student_dense, context.teacher_dense
        mask = anchors_at(
            rois,
            ours.flat_anchors,
            num_images=len(context.image_sizes),
            threshold=self.anchor_threshold,
        )
        rows = mask.flatten().nonzero().squeeze(1)  # few of all anchors
        count, terms = max(len(rows), 1), {}
        if "loss_kd_gid_class" in self.weights:
            logits = (x.logits_at(rows) for x in (ours, theirs))
            terms["loss_kd_gid_class"] = sigmoid_kl(*logits, 1.0).sum() / count
        if "loss_kd_gid_box" in self.weights:
            s, t = (x.flat_deltas.flatten(0, 1)[rows].float() for x in (ours, theirs))
            t = convert_deltas(t, theirs.transform, ours.transform)
            terms["loss_kd_gid_box"] = F.l1_loss(s, t, reduction="sum") / count
        return terms
