"""The distiller: teacher, pooler, prototypes and losses of one student. The only orchestrator.

It gathers what a training step offers, asks each loss for its terms, and multiplies them by their
weights. It does not know how any loss works, nor which meta-architecture it serves.
"""

import logging
from typing import Callable, Dict, FrozenSet, List, Optional, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .features import InstancePooler, LevelPair, align_levels, match_levels
from .losses import DistillContext, DistillLoss, InstanceRows, StudentOutputs
from .losses.base import READ_OF_HEADS
from .losses.building import active_losses, build_loss, check_terms
from .non_finite import NonFiniteLosses
from .pairing import check_pair, hidden_channels, inherit_heads
from .prototypes.bank import PrototypeBank
from .prototypes.refresh import PrototypeRefresher
from .prototypes.reservoir import InstanceReservoir
from .prototypes.structures import PrototypeSet
from .requirement import require
from .schedule import WeightSchedule
from .teacher import Teacher
from .teacher.building import teacher_from_config
from .visualization import put_reliability

logger = logging.getLogger(__name__)

#: Observations are written every so many iterations: as often as Detectron2 prints.
LOG_PERIOD = 20
#: Formats that a teacher takes from a student of the other one.
_FLIPPED = {"RGB", "BGR"}


class Distiller(nn.Module):
    """Turns a student's training step into a distillation step.

    Its parameters (adapters and the like) are trained with the student. Its `state_dict` holds
    those and the prototypes; the teacher is in neither.
    """

    @configurable
    def __init__(
        self,
        *,
        teacher: Teacher,
        losses: Sequence[DistillLoss],
        refresher: Optional[PrototypeRefresher] = None,
        in_features: Sequence[str] = (),
        instances: str = "positives",
        pooler_resolution: int = 7,
        projection: str = "cosine",
        projection_lambda: float = 10.0,
        reliability: str = "coefficients",
        inherit_teacher_heads: bool = False,
        weight: float = 1.0,
        warmup_iters: int = 0,
        stop_iter: int = 0,
        decay: str = "none",
        max_iter: int = 0,
        non_finite_loss: str = "raise",
        vis_period: int = 0,
    ):
        """
        Args:
            teacher: the frozen detector.
            losses: the losses to add up; at least one with a weight.
            refresher: makes the prototypes; needed if a loss reads them.
            vis_period: iterations between two pictures of the reliability weights; 0 for none.

        The other arguments are keys of MODEL.GLOBALKD: see `from_config`, and `config.py`. `decay`
        is "none" here, as "linear" and "cosine" need `max_iter`.
        """
        super().__init__()
        for key, value, allowed in (
            ("INSTANCES", instances, ("positives", "ground_truth")),
            ("NON_FINITE_LOSS", non_finite_loss, ("raise", "skip")),
        ):
            require(key, value, value in allowed, allowed)
        if not isinstance(teacher, Teacher):
            raise TypeError(f"`teacher` is a {type(teacher).__name__}; make a Teacher of it.")
        self._teacher = (teacher,)  # in a tuple, and not a module: hidden from nn.Module
        self.losses = active_losses(losses)
        self.refresher = refresher
        self.in_features = in_features
        self.instances = instances
        self.pooler = InstancePooler(pooler_resolution)
        self.bank: Optional[PrototypeBank] = None
        self.reservoir: Optional[InstanceReservoir] = None
        self.bank_settings = {
            "projection": projection,
            "projection_lambda": projection_lambda,
            "reliability": reliability,
        }
        self.inherit_teacher_heads = inherit_teacher_heads
        self.schedule = WeightSchedule(weight, warmup_iters, stop_iter, decay, max_iter)
        self.non_finite = NonFiniteLosses(skip=non_finite_loss == "skip")
        self.input_format = ""  # of the student that it is attached to
        self.vis_period = vis_period
        self.levels: List[LevelPair] = []
        self._prepared = -1  # the latest iteration that was prepared
        self._begun = False  # whether its state is that of a run: started, or restored

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.GLOBALKD
        return {
            "teacher": teacher_from_config(cfg),
            "losses": [build_loss(cfg, name) for name in node.LOSSES],
            "refresher": PrototypeRefresher(cfg),
            "in_features": node.IN_FEATURES,
            "instances": node.INSTANCES,
            "pooler_resolution": node.POOLER_RESOLUTION,
            "projection": node.PROJECTION.TYPE,
            "projection_lambda": node.PROJECTION.LAMBDA,
            "reliability": node.RELIABILITY.TYPE,
            "inherit_teacher_heads": node.INHERIT_TEACHER_HEADS,
            "weight": node.WEIGHT,
            "warmup_iters": node.WARMUP_ITERS,
            "stop_iter": node.STOP_ITER,
            "decay": node.DECAY,
            "max_iter": cfg.SOLVER.MAX_ITER,
            "non_finite_loss": node.NON_FINITE_LOSS,
            "vis_period": cfg.VIS_PERIOD,
        }

    @property
    def teacher(self) -> Teacher:
        """The frozen detector; no submodule: checkpoints and optimizers do without it."""
        return self._teacher[0]

    def _apply(self, fn, *args, **kwargs):
        self.teacher.apply_(fn)
        return super()._apply(fn, *args, **kwargs)

    def attach(self, student: nn.Module) -> None:
        """Create what depends on the pair: matched levels, prototype bank, adapters. Called once.

        Raises:
            ValueError: the pair cannot be distilled as configured.
        """
        self.input_format = _check_formats(student, self.teacher)
        self.levels = match_levels(
            student.backbone.output_shape(), self.teacher.output_shape, self.in_features
        )
        logger.info(
            "Distilled levels (student <- teacher): "
            + ", ".join(f"{p.student} <- {p.teacher} (stride {p.stride})" for p in self.levels)
        )
        num_classes = getattr(student, "roi_heads", student).num_classes
        check_pair(
            student,
            self.teacher,
            self.losses,
            levels=[p.student for p in self.levels],
            num_classes=num_classes,
        )
        names = [p.teacher for p in self.levels]
        self.teacher.read_levels(
            list(self.teacher.output_shape) if self.reads & READ_OF_HEADS else names
        )
        weighted = self.bank_settings["reliability"] != "none"
        reading = [
            n
            for n, x in self.losses.items()
            if "bank" in x.reads or (x.use_reliability and weighted)
        ]
        if reading:
            if self.refresher is None:
                raise ValueError(
                    f"{reading} read prototypes or weigh by reliability: give the Distiller a "
                    "`refresher`, or the losses `use_reliability=False`."
                )
            generation = self.refresher.generation
            self.bank = PrototypeBank(
                levels=[p.student for p in self.levels],
                num_classes=num_classes,
                teacher_channels={p.student: p.teacher_channels for p in self.levels},
                student_channels={p.student: p.student_channels for p in self.levels},
                num_prototypes=generation.num_prototypes,
                normalize=generation.normalize,
                **self.bank_settings,
            )
            self.reservoir = self.refresher.build_reservoir(self.levels, num_classes)
        for loss in self.losses.values():
            loss.num_classes = num_classes
            if loss.hidden_depth:
                loss.hidden_channels = hidden_channels(student, self.teacher, loss.hidden_depth)
            loss.attach(self.levels)
        self.to(next(student.parameters()).device)

    @property
    def reads(self) -> FrozenSet[str]:
        """What of a step's context some loss reads; see `DistillLoss.reads`."""
        return frozenset().union(*(loss.reads for loss in self.losses.values()))

    @property
    def hidden_depths(self) -> Tuple[int, ...]:
        """The depths of the dense heads' towers that losses read."""
        return tuple(sorted({x.hidden_depth for x in self.losses.values() if x.hidden_depth}))

    @torch.compiler.disable  # data loading, extraction: nothing that a compiled step could hold
    @torch.no_grad()
    def prepare(self, student: nn.Module, iteration: int) -> None:
        """Do what must happen before the step of an iteration; a second call does nothing.

        At iteration 0 the student inherits the teacher's heads if asked; prototypes are made or
        loaded when they are due. Every process must call it at the same iteration.
        """
        if self._prepared == iteration:
            return
        self._prepared = iteration
        if iteration == 0:
            self.start(student)
        elif not self._begun and (self.state_dict() or self.inherit_teacher_heads):
            heads = ", and no heads are inherited" if self.inherit_teacher_heads else ""
            logger.warning(
                f"Training goes on at iteration {iteration} without the distiller's own state: "
                f"adapters start anew, prototypes are made again{heads}. The checkpoint has none, "
                'or nothing loaded it: checkpointer.add_checkpointable("distiller", '
                "model.distiller) does, before the trainer resumes."
            )
        self._begun = True
        if iteration == self.schedule.max_iter > 0 and self.schedule(iteration) == 0:
            logger.warning(
                f"Training goes on past SOLVER.MAX_ITER ({iteration}), where MODEL.GLOBALKD.DECAY "
                f"{self.schedule.decay!r} ends: distillation losses are 0 from here on."
            )
        if self.bank is None or self.schedule(iteration) == 0:
            return
        if not self.bank.is_ready and self.refresher.file:
            self.refresher.load(self.bank)
        if not self.refresher.is_due(iteration, self.bank):
            return
        if self.reservoir is not None and self.bank.is_ready:
            self.refresher.refresh_from(self.reservoir, self.bank, iteration)
        else:
            self.refresh(student)

    def start(self, student: nn.Module) -> List[str]:
        """What comes once, before prototypes and the first step: inherited heads, if asked for.

        Returns:
            The names of the student's entries that were filled.
        """
        self._begun = True
        return inherit_heads(student, self.teacher.model) if self.inherit_teacher_heads else []

    def load_state_dict(self, *args, **kwargs):
        # Not called where a student that holds this distiller is loaded.
        self._begun = True
        return super().load_state_dict(*args, **kwargs)

    def refresh(
        self, student: nn.Module, num_images: Optional[int] = None
    ) -> Optional[PrototypeSet]:
        """Make prototypes with the present student; see `PrototypeRefresher.refresh`."""
        return self.refresher.refresh(
            student,
            self.teacher,
            self.bank,
            levels=self.levels,
            pooler=self.pooler,
            num_images=num_images,
        )

    def begin(self, batched_inputs: List[dict]) -> Callable[[], Dict[str, Tensor]]:
        """Begin a step, before the student's forward: its pass of the teacher; see `Teacher.begin`.

        Returns:
            What `forward` takes as `teacher_pass`.
        """
        return self.teacher.begin(batched_inputs, self.input_format)

    def forward(
        self,
        batched_inputs: List[dict],
        student: StudentOutputs,
        detection_losses: Dict[str, Tensor],
        teacher_pass: Optional[Callable[[], Dict[str, Tensor]]] = None,
    ) -> Dict[str, Tensor]:
        """Weighted distillation terms of one step.

        Args:
            batched_inputs: the student's input, with "instances".
            student: what its forward pass of this step left.
            detection_losses: the plain losses, for the logged ratios only.
            teacher_pass: what `begin` returned for this batch; None begins it now.

        Returns:
            term name -> scalar, to be added to the student's losses.
        """
        iteration = get_event_storage().iter
        factor = self.schedule(iteration)
        self.non_finite.watch_parameters(self.losses)
        student = self.non_finite.watch_student(student)
        teacher_features = (teacher_pass or self.begin(batched_inputs))()
        context = self._context(batched_inputs, student, teacher_features, iteration)
        terms: Dict[str, Tensor] = {}
        for loss in self.losses.values():
            own = loss(context)
            check_terms(loss, own, detection_losses)
            terms.update({n: term * (factor * loss.weights[n]) for n, term in own.items()})
        terms = self.non_finite.watch_terms(terms, iteration, batched_inputs)
        if self.reservoir is not None:
            self._harvest(context)
        if (iteration + 1) % LOG_PERIOD == 0:
            self._write_observations(context, terms, detection_losses)
        if self.bank is not None and self.vis_period > 0 and iteration % self.vis_period == 0:
            put_reliability(get_event_storage(), context, self.input_format)
        return terms

    def _context(
        self, batched_inputs, student: StudentOutputs, teacher_features, iteration
    ) -> DistillContext:
        image_sizes = [tuple(x["image"].shape[-2:]) for x in batched_inputs]
        student_maps, teacher_maps = align_levels(
            self.levels,
            student.features,
            self.teacher.on_input_grid(teacher_features),
            image_sizes,
            self.teacher.input_scale,
        )
        ground_truth = InstanceRows.from_ground_truth(
            [x["instances"] for x in batched_inputs], student.positives.boxes.device
        )
        return DistillContext(
            levels=self.levels,
            student_maps=student_maps,
            teacher_maps=teacher_maps,
            teacher_features=teacher_features,
            image_sizes=image_sizes,
            ground_truth=ground_truth,
            positives=student.positives,
            candidates=student.candidates,
            instances=student.positives if self.instances == "positives" else ground_truth,
            pooler=self.pooler,
            teacher=self.teacher,
            bank=self.bank,
            student_dense=student.dense,
            reads=self.reads,
            hidden_depths=self.hidden_depths,
            iteration=iteration,
            batched_inputs=batched_inputs,
        )

    @torch.no_grad()
    def _harvest(self, context: DistillContext) -> None:
        """Put the annotated boxes of a step into the reservoir.

        They and not the positives, since prototypes are defined on them; a loss that pools them,
        too, has done the work already.
        """
        rows, instances = context.ground_truth, context.on_ground_truth
        scale = [
            (x.get("width", width) / width, x.get("height", height) / height)
            for x, (height, width) in zip(context.batched_inputs, context.image_sizes)
        ]
        scale = torch.tensor(scale).to(rows.boxes.device, non_blocking=True)[rows.image_index]
        self.reservoir.add(
            instances.teacher_instance_features,
            instances.student_instance_features,
            classes=rows.classes,
            boxes=rows.boxes * scale.repeat(1, 2),
            iteration=context.iteration,
        )

    def zero_terms(self) -> Dict[str, Tensor]:
        """Terms of a step without distillation: 0, yet every parameter takes part in it."""
        device = self.teacher.model.device
        zero = sum((p.sum() * 0.0 for p in self.parameters()), torch.zeros((), device=device))
        names = [name for loss in self.losses.values() for name in loss.weights]
        return dict.fromkeys(names, zero)

    def _write_observations(self, context: DistillContext, terms, detection_losses) -> None:
        """One transfer from the device, every LOG_PERIOD iterations."""
        detection = sum(x.detach() for x in detection_losses.values()).clamp_min(1e-12)
        values = {f"kd/ratio_{k}": v.detach() / detection for k, v in terms.items()}
        if self.bank is not None and len(context.instances):
            values["kd/reliability"] = torch.stack(list(context.reliability.values())).mean()
        values.update(context.observations)
        numbers = torch.stack([v.float() for v in values.values()]).tolist()
        storage = get_event_storage()
        storage.put_scalars(smoothing_hint=False, **dict(zip(values, numbers)))
        storage.put_scalar("kd/num_instances", len(context.instances), smoothing_hint=False)
        if self.non_finite.skip:
            skipped = self.non_finite.report()
            storage.put_scalar("kd/skipped_steps", skipped, smoothing_hint=False)


def _check_formats(student: nn.Module, teacher: Teacher) -> str:
    """The student's channel order; a ValueError where the teacher's cannot be made of it."""
    formats = {student.input_format, teacher.input_format}
    if len(formats) > 1 and formats != _FLIPPED:
        raise ValueError(
            f"INPUT.FORMAT is {student.input_format!r} and the teacher's "
            f"{teacher.input_format!r}: only RGB and BGR are turned into each other."
        )
    return student.input_format
