"""What a distillation loss is, and what it may read: the context of one training step.

A loss is one module in DISTILL_LOSS_REGISTRY. It takes a `DistillContext` and returns named,
unweighted terms. Whatever costs time in the context is computed on first use and then shared, so
that a sum of losses pays once for the teacher's pass, the pooling and the heads.

Shapes: N images, L levels, R instances, M positives, K classes, P prototypes, D channels.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Dict, FrozenSet, List, Optional, Sequence, Tuple

import torch
from detectron2.structures import Boxes
from fvcore.common.registry import Registry
from torch import Tensor, nn

from ..dense_head import DenseOutputs
from ..features import InstancePooler, LevelPair
from ..prototypes.bank import PrototypeBank
from ..teacher import Teacher
from .outputs import Candidates, InstanceRows, Positives, Responses

DISTILL_LOSS_REGISTRY = Registry("DISTILL_LOSS")
DISTILL_LOSS_REGISTRY.__doc__ = """
Distillation losses by name, as MODEL.GLOBALKD.LOSSES lists them: `DistillLoss` subclasses that can
be built from a config alone (their constructor is Detectron2's `configurable`).
"""
#: What of a `DistillContext` a loss must name in `DistillLoss.reads` if it reads it.
READ = frozenset({"bank", "responses", "predictions", "student_dense", "teacher_dense"})
#: Those for which the teacher's heads run, and need all the levels that they were trained on.
READ_OF_HEADS = frozenset({"responses", "predictions", "teacher_dense"})


class DistillLoss(nn.Module):
    """Base class of the losses.

    Attributes:
        weights: term name -> weight above 0. The distiller multiplies, and nothing else does. A
            loss without any is left out.
        use_reliability: whether the loss weighs instances with `context.reliability`.
        node: the loss's keys below MODEL.GLOBALKD: the arguments of its constructor, in capitals.
            Empty: it has none.
        reads: which of `READ` the loss reads in the context. It decides what is built and checked.
        compares_classes: whether it compares the classes of dense predictions one by one, so that
            both detectors need the same ones.
        hidden_depth: at which depth it reads the towers of both RetinaNet heads, in `hidden` of
            their dense outputs; 0 for none. It reads "teacher_dense", too.
        hidden_channels: of student and teacher at that depth; set before `attach` is called.
        stages: the detectors that the method is defined for: "any", "one" stage or "two".
        num_classes: K; set before `attach` is called.
    """

    node: ClassVar[str] = ""
    reads: FrozenSet[str] = frozenset()
    compares_classes: bool = False
    hidden_depth: int = 0
    hidden_channels: Tuple[int, int] = (0, 0)
    stages: str = "any"
    num_classes: int = 0

    def __init__(self, weights: Dict[str, float], *, use_reliability: bool = False):
        """
        Args:
            weights: term name -> weight, 0 or more; terms of weight 0 are left out.
            use_reliability: see above.
        """
        super().__init__()
        negative = {name: w for name, w in weights.items() if w < 0}
        if negative:
            raise ValueError(f"The weight of a distillation loss cannot be negative: {negative}.")
        self.weights = {name: w for name, w in weights.items() if w}
        self.use_reliability = use_reliability

    @classmethod
    def from_config(cls, cfg):
        keys = cfg.MODEL.GLOBALKD[cls.node] if cls.node else {}
        return {name.lower(): value for name, value in keys.items()}

    def attach(self, levels: Sequence[LevelPair]) -> None:
        """Create what depends on the pair of detectors, such as adapters. Called once.

        Raises:
            UnfitLosses: the loss cannot compare them.
        """

    def forward(self, context: "DistillContext") -> Dict[str, Tensor]:
        """Unweighted scalar terms, one for each key of `weights`.

        Without an instance a term is a zero that still carries gradient to the loss's own
        parameters and to the student, so that no process waits for another.
        """
        raise NotImplementedError

    def instance_weight(self, context: "DistillContext", level: str) -> Tensor:
        """(R,) reliability of the context's instances where the loss weighs with it, else 1."""
        if self.use_reliability:
            return context.reliability[level]
        return context.instances.boxes.new_ones(len(context.instances))


@dataclass
class DistillContext:
    """Everything that one training step offers to the losses.

    Attributes:
        levels: matched levels, finest first. Dictionaries below have the student's level names.
        student_maps: level -> (N, D_s, H, W), with gradient.
        teacher_maps: level -> (N, D_t, H, W), detached, of the same H and W.
        teacher_features: the teacher's maps under its own names: all that its heads read if some
            loss asks for their predictions, else those of `levels`.
        image_sizes: per-image (height, width) of the input.
        ground_truth: the annotated boxes.
        positives: the student's positive proposals or anchors.
        candidates: everything that its class head scored.
        instances: what counts as an instance: `ground_truth` or `positives`.
        bank: the prototypes; None where no loss asks for them.
        pooler: RoIAlign of the instances.
        teacher: the frozen detector.
        student_dense: the outputs of the student's dense head; None where it has none.
        reads: what of `READ` some loss reads. With "predictions" the teacher's head runs on all
            rows at once, with "teacher_dense" on all anchors; `responses` are picked from there.
        hidden_depths: what `hidden` of both detectors' dense outputs has.
        iteration: of the training.
        batched_inputs: the student's input.
    """

    levels: Sequence[LevelPair]
    student_maps: Dict[str, Tensor]
    teacher_maps: Dict[str, Tensor]
    teacher_features: Dict[str, Tensor]
    image_sizes: List[Tuple[int, int]]
    ground_truth: InstanceRows
    positives: Positives
    candidates: Candidates
    instances: InstanceRows
    pooler: InstancePooler
    teacher: Teacher
    bank: Optional[PrototypeBank] = None
    student_dense: Optional[DenseOutputs] = None
    reads: FrozenSet[str] = frozenset()
    hidden_depths: Sequence[int] = ()
    iteration: int = 0
    batched_inputs: List[dict] = field(default_factory=list)
    #: name -> detached scalar, written to the EventStorage now and then; losses may add to it.
    observations: Dict[str, Tensor] = field(default_factory=dict)
    #: What one loss computed and another may want too, by a key that says what it is.
    shared: Dict[tuple, Any] = field(default_factory=dict)

    @cached_property
    def student_instance_features(self) -> Dict[str, Tensor]:
        """Level -> (R, D_s) float32, with gradient."""
        rois = self.instances.rois
        maps = self.student_maps
        return {p.student: self.pooler(maps[p.student], rois, p.stride) for p in self.levels}

    @cached_property
    def teacher_instance_features(self) -> Dict[str, Tensor]:
        """Level -> (R, D_t) float32, detached."""
        rois = self.instances.rois
        maps = self.teacher_maps
        return {p.student: self.pooler(maps[p.student], rois, p.stride) for p in self.levels}

    @cached_property
    def reliability(self) -> Dict[str, Tensor]:
        """Level -> (R,) the weight omega of Eq. (8) in [0, 1], detached; 1 without prototypes."""
        if self.bank is None:
            ones = self.instances.boxes.new_ones(len(self.instances))
            return {p.student: ones for p in self.levels}
        student = {n: x.detach() for n, x in self.student_instance_features.items()}
        weight = self.bank.reliability(
            self.teacher_instance_features, student, self.instances.classes
        )
        return dict(zip(student, weight.unbind()))

    @property
    def on_ground_truth(self) -> "DistillContext":
        """The same step with the annotated boxes as its instances."""
        # Nothing keeps a reference to itself: the maps of a step go with its last reader.
        return self if self.instances is self.ground_truth else self._with_ground_truth

    @cached_property
    def _with_ground_truth(self) -> "DistillContext":
        return replace(self, instances=self.ground_truth)

    @cached_property
    def teacher_dense(self) -> DenseOutputs:
        """The teacher's dense head on its own maps, with the names of `student_dense`."""
        self._require_heads()
        ours = self.student_dense.logits
        # The pair was checked to have the same anchors: to make them anew would take time.
        anchors = [Boxes(x.flatten(0, 2)) for x in self.student_dense.anchors.values()]
        outputs = self.teacher.dense_outputs(self.teacher_features, anchors, self.hidden_depths)
        return outputs.renamed(list(ours))

    @cached_property
    def predictions(self) -> Responses:
        """Both detectors' class predictions on all `candidates`; each head ran once."""
        self._require_heads()
        candidates = self.candidates
        return Responses(
            student=candidates.student_logits(self),
            teacher=candidates.teacher_logits(self).detach(),
            labels=candidates.labels,
            normalizer=candidates.normalizer,
            one_stage=candidates.one_stage,
        )

    @cached_property
    def responses(self) -> Responses:
        """Both detectors' class predictions on the positives; each head ran once."""
        self._require_heads()
        rows = self.positives.rows
        if "predictions" in self.reads:
            student, teacher = self.predictions.student[rows], self.predictions.teacher[rows]
        else:
            student = self.candidates.student_logits(self, rows)
            teacher = self.candidates.teacher_logits(self, rows).detach()
        return Responses(
            student=student,
            teacher=teacher,
            labels=self.positives.classes,
            normalizer=max(len(rows), 1),
            one_stage=self.candidates.one_stage,
        )

    def _require_heads(self) -> None:
        if not self.reads & READ_OF_HEADS:
            raise ValueError(
                "A loss reads what the teacher's heads say, and none names it in its `reads`: one "
                f"of {sorted(READ_OF_HEADS)}. Without it the pair of detectors was not checked."
            )

    @cached_property
    def prediction_reliability(self) -> Tensor:
        """(B,) `response_reliability` of the rows of `predictions`; 1 where it is no positive."""
        ones = torch.ones_like(self.candidates.labels, dtype=torch.float32)
        return ones.index_copy(0, self.positives.rows, self.response_reliability.float())

    @cached_property
    def response_reliability(self) -> Tensor:
        """(M,) omega of each positive at the level that predicts it, or at the nearest one."""
        if self.bank is None or len(self.instances) == 0:
            return self.positives.boxes.new_ones(len(self.positives))
        by_level = torch.stack([self.reliability[p.student] for p in self.levels])  # (L, R)
        strides = torch.tensor([float(p.stride) for p in self.levels])
        strides = strides.to(self.positives.strides, non_blocking=True)
        level = (self.positives.strides.log2()[:, None] - strides.log2()).abs().argmin(dim=1)
        return by_level[level, self._instance_of_positive()]

    def _instance_of_positive(self) -> Tensor:
        """(M,) row of `instances` that each positive stands for."""
        if self.instances is self.positives:
            return torch.arange(len(self.positives), device=self.positives.boxes.device)
        return self.positives.matched_rows(self.instances)
