"""The distilling meta-architectures: stock Detectron2 detectors plus a distiller.

Nothing of a parent's `forward` is copied: what the distiller needs is recorded while it runs.
In evaluation, and without a distiller, they are the stock detectors.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Callable, ClassVar, Dict, Iterator, List, NoReturn, Optional, Tuple
from unittest import mock

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .data.config_checks import check_classes
from .dense_head import DenseOutputs, find_dense_head, tower_layers
from .distiller import Distiller
from .features import assigned_levels, record_calls, record_outputs
from .losses import Candidates, DistillContext, Positives, StudentOutputs

_HIDDEN = "distiller."


@dataclass
class ProposalCandidates(Candidates):
    """The student's sampled proposals.

    Attributes:
        logits: (B, C), with gradient.
        boxes: (B, 4) XYXY_ABS in input pixels.
        image_index: (B,) int64, ascending.
    """

    logits: Tensor
    boxes: Tensor
    image_index: Tensor
    one_stage: ClassVar[bool] = False

    def student_logits(self, context: DistillContext, rows: Optional[Tensor] = None) -> Tensor:
        return self.logits if rows is None else self.logits[rows]

    def aliased(self, alias: Callable[[Tensor], Tensor]) -> "ProposalCandidates":
        return replace(self, logits=alias(self.logits))

    def teacher_logits(self, context: DistillContext, rows: Optional[Tensor] = None) -> Tensor:
        boxes, image = self.boxes, self.image_index
        if rows is not None:
            boxes, image = boxes[rows], image[rows]
        return context.teacher.box_logits(
            context.teacher_features, boxes, image, context.image_sizes
        )


@dataclass
class AnchorCandidates(Candidates):
    """All anchors of all images, image by image: the student's logits are in its dense outputs."""

    one_stage: ClassVar[bool] = True

    def student_logits(self, context: DistillContext, rows: Optional[Tensor] = None) -> Tensor:
        dense = context.student_dense
        return dense.flat_logits.flatten(0, 1) if rows is None else dense.logits_at(rows)

    def teacher_logits(self, context: DistillContext, rows: Optional[Tensor] = None) -> Tensor:
        apart = rows is not None and "teacher_dense" not in context.reads
        if apart and context.teacher.scores_single_anchors:
            return context.teacher.anchor_logits(context.teacher_features, rows, len(self.labels))
        logits = context.teacher_dense.flat_logits.flatten(0, 1)
        return logits if rows is None else logits[rows]


class DistillMixin:
    """Adds a distiller to a meta-architecture; the class it is mixed into comes after it.

    The distiller's parameters are the model's (optimizer and DDP see them), but `state_dict()`
    shows the stock detector alone, and loading does not ask for more. To distil one of your own,
    mix in a class of this module: `class MyDistilled(DistillGeneralizedRCNN, MyRCNN)`.
    """

    @configurable
    def __init__(self, *, distiller: Optional[Distiller] = None, **kwargs):
        """
        Args:
            distiller: None for the stock detector.
            kwargs: the parent's arguments.
        """
        super().__init__(**kwargs)
        self.distiller = distiller
        if type(self)._scored is DistillMixin._scored:
            raise TypeError(
                f"{type(self).__name__} cannot be distilled: derive it from "
                "DistillGeneralizedRCNN or DistillRetinaNet in the place of DistillMixin."
            )
        if distiller is not None:
            distiller.attach(self)
            self._register_state_dict_hook(_hide_distiller)
            self.register_load_state_dict_post_hook(_forgive_distiller)

    @classmethod
    def from_config(cls, cfg):
        try:
            kwargs = super().from_config(cfg)
        except KeyError as error:
            _explain_missing_level(cfg, error.args[0])
            raise
        kwargs["distiller"] = None
        if cfg.MODEL.GLOBALKD.ENABLED:
            kwargs["distiller"] = distiller = Distiller(cfg)
            check_classes(cfg, distiller.teacher.class_names, test=False)
        return kwargs

    def forward(self, batched_inputs: List[dict], *args, **kwargs):
        """The parent's `forward`; in training, with the distillation terms among the losses."""
        # Without gradient it is no training step, also in training mode: a pass for the statistics
        # of batch norms, or for the loss of validation data.
        if not self.training or self.distiller is None or not torch.is_grad_enabled():
            return super().forward(batched_inputs, *args, **kwargs)
        iteration = get_event_storage().iter
        self.distiller.prepare(self, iteration)
        if self.distiller.schedule(iteration) == 0:
            losses = super().forward(batched_inputs, *args, **kwargs)
            return {**losses, **self.distiller.zero_terms()}
        # Once for both detectors: what is there already, they do not send to the device again.
        batched_inputs = [
            {**x, "image": x["image"].to(self.device, non_blocking=True)} for x in batched_inputs
        ]
        teacher_pass = self.distiller.begin(batched_inputs)
        with self._recording() as recorded:
            losses = super().forward(batched_inputs, *args, **kwargs)
        if not isinstance(losses, dict):
            raise TypeError(
                f"In training `forward` of {type(self).__name__}'s parent must return a dict of "
                f"losses; it returned a {type(losses).__name__}."
            )
        losses.update(self.distiller(batched_inputs, self._outputs(recorded), losses, teacher_pass))
        return losses

    @contextmanager
    def _recording(self) -> Iterator[Dict[str, Any]]:
        depths, dense = self.distiller.hidden_depths, find_dense_head(self)
        layers = tower_layers(dense.module, depths) if depths else {}
        with (
            record_outputs(self._recorded_modules()) as recorded,
            record_calls(layers) as recorded_layers,
        ):
            recorded["hidden"] = recorded_layers
            yield recorded

    def _recorded_modules(self) -> Dict[str, nn.Module]:
        modules = {"backbone": self.backbone}
        dense = find_dense_head(self)
        if dense is not None:
            modules.update(dense_head=dense.module, anchors=dense.anchor_generator)
        return modules

    def _scored(self, recorded: Dict[str, Any]) -> Tuple[Candidates, Positives]:
        """What the class head scored, and the foreground among it."""
        raise NotImplementedError

    def _outputs(self, recorded: Dict[str, Any]) -> StudentOutputs:
        dense = find_dense_head(self)
        if dense is not None:
            logits, deltas = recorded["dense_head"][:2]
            dense = DenseOutputs.collect(
                dense, recorded["anchors"], logits, deltas, recorded["hidden"]
            )
        candidates, positives = self._scored(recorded)
        return StudentOutputs(recorded["backbone"], candidates, positives, dense)


def _explain_missing_level(cfg, level: Any) -> None:
    """Raise a ValueError where this is a level that the config asks of a backbone without it."""
    heads = ("RETINANET", "RPN", "ROI_HEADS")
    keys = [f"MODEL.{h}.IN_FEATURES" for h in heads if level in cfg.MODEL[h].IN_FEATURES]
    if keys:
        raise ValueError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME!r} has no level {level!r}, which "
            f"{' and '.join(keys)} names. Is MODEL.META_ARCHITECTURE, "
            f"{cfg.MODEL.META_ARCHITECTURE!r}, that of the detector in _BASE_?"
        ) from None


def _hide_distiller(_module, state_dict, prefix, _metadata):
    for key in [key for key in state_dict if key.startswith(prefix + _HIDDEN)]:
        del state_dict[key]


def _forgive_distiller(_module, incompatible):
    # Keys have the prefix of whatever the detector is wrapped into.
    kept = [key for key in incompatible.missing_keys if f".{_HIDDEN}" not in f".{key}"]
    incompatible.missing_keys[:] = kept


@META_ARCH_REGISTRY.register()
class DistillGeneralizedRCNN(DistillMixin, GeneralizedRCNN):
    """A two-stage student: `GeneralizedRCNN` with any box heads of Detectron2."""

    @property
    def _box_predictor(self) -> nn.Module:
        predictor = getattr(self.roi_heads, "box_predictor", None)
        if isinstance(predictor, nn.ModuleList):  # a cascade: its first stage sees the proposals
            predictor = predictor[0]
        if not hasattr(predictor, "losses"):
            self._refuse_heads()
        return predictor

    def _refuse_heads(self) -> NoReturn:
        raise ValueError(
            f"{type(self.roi_heads).__name__} cannot be distilled: in training its `forward` must "
            "call `box_predictor.losses(predictions, proposals)` with a tuple that begins with "
            "class logits, as Detectron2's ROI heads do."
        )

    @contextmanager
    def _recording(self) -> Iterator[Dict[str, Any]]:
        predictor = self._box_predictor
        losses = predictor.losses

        def record_scored(predictions, proposals, *args, **kwargs):
            # Where the detector itself says which belong together; some heads score a part of what
            # was sampled, or in another order. Copied: some move their boxes afterwards.
            copies = [Instances(x.image_size, **x.get_fields()) for x in proposals]
            recorded.setdefault("scored", (predictions, copies))
            return losses(predictions, proposals, *args, **kwargs)

        with (
            super()._recording() as recorded,
            mock.patch.object(predictor, "losses", record_scored),
        ):
            yield recorded

    def _scored(self, recorded: Dict[str, Any]) -> Tuple[ProposalCandidates, Positives]:
        predictions, proposals = recorded.get("scored", (None, None))
        if not isinstance(predictions, tuple):
            self._refuse_heads()
        logits = predictions[0]
        boxes = [x.proposal_boxes.tensor for x in proposals]
        # An image without annotations has no field gt_boxes, and no foreground that would need it.
        gt_boxes = [x.get("gt_boxes" if x.has("gt_boxes") else "proposal_boxes") for x in proposals]
        classes = torch.cat([x.gt_classes for x in proposals])
        image_index = torch.cat([torch.full_like(x.gt_classes, i) for i, x in enumerate(proposals)])
        foreground = (classes >= 0) & (classes < self.roi_heads.num_classes)
        rows = foreground.nonzero().squeeze(1)
        boxes = torch.cat(boxes)
        positives = Positives(
            boxes=boxes[rows],
            image_index=image_index[rows],
            classes=classes[rows],
            gt_boxes=Boxes.cat(gt_boxes).tensor[rows],
            strides=self._strides(boxes[rows]),
            rows=rows,
        )
        count = max(len(classes), 1)
        return ProposalCandidates(classes, count, logits, boxes, image_index), positives

    def _strides(self, boxes: Tensor) -> Tensor:
        """(M,) stride of the level from which the box head pools each box."""
        heads = self.roi_heads
        pooler = heads.box_pooler if hasattr(heads, "box_pooler") else heads.pooler
        return 2.0 ** (assigned_levels(pooler, boxes) + pooler.min_level)


@META_ARCH_REGISTRY.register()
class DistillRetinaNet(DistillMixin, RetinaNet):
    """A one-stage student: RetinaNet."""

    @contextmanager
    def _recording(self) -> Iterator[Dict[str, Any]]:
        losses = self.losses

        def record_labels(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, *more):
            recorded.setdefault("losses", (anchors, gt_labels, gt_boxes))
            return losses(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, *more)

        with (
            super()._recording() as recorded,
            mock.patch.object(self, "losses", record_labels),
        ):
            yield recorded

    def _scored(self, recorded: Dict[str, Any]) -> Tuple[AnchorCandidates, Positives]:
        if "losses" not in recorded:
            raise ValueError(
                f"{type(self).__name__} cannot be distilled: in training its `forward` must call "
                "`losses(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes)`, as "
                "Detectron2's RetinaNet does."
            )
        anchors, gt_labels, gt_boxes = recorded["losses"]
        num_anchors = len(gt_labels[0])
        labels = torch.cat(gt_labels)
        rows = ((labels >= 0) & (labels < self.num_classes)).nonzero().squeeze(1)
        anchor = rows % num_anchors
        level_strides = [
            labels.new_full((len(a),), stride)
            for a, stride in zip(anchors, self.anchor_generator.strides)
        ]
        positives = Positives(
            boxes=Boxes.cat(anchors).tensor[anchor],
            image_index=rows // num_anchors,
            classes=labels[rows],
            gt_boxes=torch.cat(gt_boxes)[rows],
            strides=torch.cat(level_strides)[anchor].float(),
            rows=rows,
        )
        return AnchorCandidates(labels, self.loss_normalizer), positives


def is_distilled(cfg: CfgNode) -> bool:
    """Whether a configuration trains a student with a teacher."""
    name = cfg.MODEL.META_ARCHITECTURE
    architecture = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    distils = isinstance(architecture, type) and issubclass(architecture, DistillMixin)
    return cfg.MODEL.GLOBALKD.ENABLED and distils


def require_distilled(cfg: CfgNode, name: str = "The configuration") -> None:
    """Raise a ValueError that says why, unless a configuration trains with a teacher.

    Args:
        name: whose configuration it is, for the message.
    """
    if not is_distilled(cfg):
        raise ValueError(
            f"{name} does not distil: MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE} and "
            f"MODEL.GLOBALKD.ENABLED is {cfg.MODEL.GLOBALKD.ENABLED}."
        )
