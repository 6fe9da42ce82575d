"""Detectron2's DefaultTrainer with a distiller: checkpoint entry, evaluators, hooks.

The same trainer trains a teacher, a plain student and a distilled one; the configuration decides.
"""

import logging
import os
from contextlib import contextmanager
from functools import partial
from typing import Callable, Iterator, List, Optional, Sequence
from unittest import mock

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, defaults
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from ..data.config_checks import check_classes, check_data
from ..data.garbage_collection import paused_collection
from ..data.registration import first_images
from ..data.resumable_loader import ResumableLoader, shield_workers
from ..data.unreadable import BlankIfUnreadable, pass_over_unreadable
from ..distiller import Distiller
from ..prototypes.settings import ImageSource
from .checkpoint import AtomicCheckpointer
from .evaluation import build_evaluator, require_evaluator
from .hooks import (
    CheckpointSaver,
    NonFiniteCheck,
    PrototypeRefresh,
    SkippedSteps,
    StepSeed,
    StopSignals,
    TeacherEvaluation,
    UnreadableImageCount,
)
from .launching import is_connection_lost
from .run_checks import (
    HOLDS_A_RUN,
    check_batch,
    check_device,
    check_evaluations,
    check_output,
    check_schedule,
    require_start,
    scale_to_processes,
    warn_of_idle_teacher,
)
from .run_state import RunState, settings_of
from .wandb_writer import WandbWriter

logger = logging.getLogger(__name__)

#: Settings that a resume takes from the checkpoint, whatever the config says.
OF_THE_OPTIMIZER = ("SOLVER.BASE_LR", "SOLVER.MOMENTUM", "SOLVER.WEIGHT_DECAY")
#: At most this many changed settings are listed at a resume.
_SHOWN = 10


class DistillTrainer(DefaultTrainer):
    """`DefaultTrainer` for distilling and for stock meta-architectures alike.

    A checkpoint's "model" entry is the stock detector; "distiller" holds adapters and prototypes,
    "run" what else a resumed run needs.
    """

    def __init__(self, cfg: CfgNode):
        self.stop_signals = StopSignals()
        cfg = scale_to_processes(cfg, comm.get_world_size())
        check_device(cfg)
        check_schedule(cfg)
        check_output(cfg)
        warn_of_idle_teacher(cfg)
        check_evaluations(cfg)
        check_data(cfg)  # before anything that takes long
        if self._evaluates_by_itself():
            for name in cfg.DATASETS.TEST:
                require_evaluator(name)
        with _own_parts(cfg):
            super().__init__(cfg)
        model = getattr(self.model, "module", self.model)
        loader = self.data_loader if self._is_exact() else None
        seed = loader.seed if loader else None
        self.run_state = RunState(model, seed, settings_of(cfg), loader)
        if cfg.DATALOADER.EXACT_RESUME and not self._is_exact():
            logger.warning(
                f"DATALOADER.EXACT_RESUME has no effect: {type(self).__name__} has a training "
                "loader of its own, whose order starts anew at a resume. "
                "DistillTrainer.build_train_loader takes a mapper and returns one that goes on."
            )
        teacher_classes = ()
        if self.distiller is not None:
            teacher_classes = self.distiller.teacher.class_names
            # Loaded before the optimizer, which would not say that the losses are others.
            own = {"distiller": self.distiller}
            self.checkpointer.checkpointables = {**own, **self.checkpointer.checkpointables}
            self._trainer.register_hooks([NonFiniteCheck()])  # it alone calls after_backward
            refresher = self.distiller.refresher
            read = ImageSource.from_config(cfg).images
            if loader is not None and refresher is not None and refresher.source.images == read:
                refresher.read_from(loader.records)
        # Again: the teacher is known by now, and so are classes that only a loaded dataset tells.
        check_classes(cfg, teacher_classes)
        # The last to be loaded: over what the first process had, it puts what each one had.
        self.checkpointer.add_checkpointable("run", self.run_state)

    @property
    def distiller(self) -> Optional[Distiller]:
        """The model's; None for a teacher or a plain student."""
        model = getattr(self.model, "module", self.model)
        return getattr(model, "distiller", None)

    def _is_exact(self) -> bool:
        """Whether data and random numbers of a step follow from the run's seed."""
        return isinstance(self.data_loader, ResumableLoader)

    @classmethod
    def _evaluates_by_itself(cls) -> bool:
        """Whether no subclass has put its own evaluation in the place of this one."""

        def owner(name: str) -> type:
            return next(c for c in cls.__mro__ if name in vars(c))

        return owner("build_evaluator") is DistillTrainer and owner("test") is DefaultTrainer

    def build_hooks(self) -> List[HookBase]:
        # Hooks run in the order of their list: prototypes come before the step's timer.
        first: List[HookBase] = [StepSeed()] if self._is_exact() else []
        if self.distiller is not None:
            count = self.cfg.MODEL.GLOBALKD.TEACHER.EVAL_IMAGES
            if count > 0:
                first.append(TeacherEvaluation(lambda: self.evaluate_teacher(count)))
            first += [PrototypeRefresh(), SkippedSteps()]
        if self.cfg.DATALOADER.MAX_UNREADABLE_IMAGES > 0:
            first.append(UnreadableImageCount())
        hooks = [h for h in super().build_hooks() if not isinstance(h, PeriodicCheckpointer)]
        # Before the evaluation, as in Detectron2: a checkpoint is there if evaluation fails.
        place = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        eval_period = self.cfg.TEST.EVAL_PERIOD if self.cfg.DATASETS.TEST else 0
        period = self.cfg.SOLVER.CHECKPOINT_PERIOD
        hooks.insert(place, CheckpointSaver(period, self.stop_signals, eval_period=eval_period))
        return [*first, *hooks]

    def train(self):
        # TorchScript (the focal loss) optimises after some calls in a process, which changes the
        # last bits. On the CPU, where a resumed run equals to the bit, it must not.
        exact = self._is_exact() and self.cfg.MODEL.DEVICE == "cpu"
        try:
            with torch.jit.optimized_execution(not exact), self.stop_signals:
                return super().train()
        except RuntimeError as error:
            if not is_connection_lost(error):
                raise
            raise RuntimeError(
                f"Process {comm.get_rank()} lost the connection to another process of this "
                "training, which has ended or hangs; its own output says why. Go on from the "
                "last checkpoint with --resume."
            ) from error

    def load_state_dict(self, state_dict):
        scaler = getattr(self._trainer, "grad_scaler", None)
        if scaler is not None and not state_dict["_trainer"].get("grad_scaler"):
            # Mixed precision begins here: Detectron2 would ask for the scaler of the steps before.
            state_dict["_trainer"]["grad_scaler"] = scaler.state_dict()
        super().load_state_dict(state_dict)

    def build_writers(self) -> List[EventWriter]:
        writers = super().build_writers()
        return [WandbWriter(self.cfg), *writers] if self.cfg.WANDB.ENABLED else writers

    def evaluate_teacher(self, num_images: int) -> dict:
        """Results of the teacher on the first images of the first test dataset."""
        name = first_images(self.cfg.DATASETS.TEST[0], num_images)
        teacher_cfg = self.cfg.clone()
        teacher_cfg.defrost()
        teacher_cfg.INPUT.FORMAT = self.distiller.teacher.input_format
        teacher_cfg.OUTPUT_DIR = os.path.join(self.cfg.OUTPUT_DIR, "teacher")
        loader = self.build_test_loader(teacher_cfg, name)
        evaluator = self.build_evaluator(teacher_cfg, name)
        return inference_on_dataset(self.distiller.teacher.model, loader, evaluator)

    @classmethod
    def build_train_loader(cls, cfg, mapper: Optional[Callable] = None):
        """Detectron2's training loader; `mapper` as its `build_detection_train_loader` takes it.

        Raises:
            ValueError: DATASETS.TRAIN or SOLVER.IMS_PER_BATCH does not allow it.
        """
        check_batch(cfg, comm.get_world_size())
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN is empty; it must name a dataset to train on.")

        @paused_collection()
        def build(records: Optional[Sequence[dict]] = None):
            loader = build_detection_train_loader(cfg, mapper=mapper, dataset=records)
            shield_workers(loader)
            pass_over_unreadable(loader, cfg.DATALOADER.MAX_UNREADABLE_IMAGES)
            return loader

        try:
            if not cfg.DATALOADER.EXACT_RESUME:
                return build()
            seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
            return ResumableLoader(build, seed)
        except AssertionError as error:
            raise ValueError(
                f"DATASETS.TRAIN = {list(cfg.DATASETS.TRAIN)}"
                f"{' gives no image to train on' * _is_of_nothing(error)}: {error}"
            ) from error

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = DatasetMapper(cfg, is_train=False)
        mapper = BlankIfUnreadable(mapper, cfg.DATALOADER.MAX_UNREADABLE_IMAGES)
        try:
            loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        except AssertionError as error:
            raise ValueError(
                f"DATASETS.TEST: '{dataset_name}'"
                f"{' has no images to evaluate on' * _is_of_nothing(error)}: {error}"
            ) from error
        shield_workers(loader)
        return loader

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return build_evaluator(cfg, dataset_name, output_folder)

    def resume_or_load(self, resume: bool = True):
        resuming = resume and self.checkpointer.has_checkpoint()
        if not resuming:
            require_start(self.cfg)
        super().resume_or_load(resume=resume)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise RuntimeError(
                f"The processes would begin at the iterations {starts}. To resume on several "
                f"machines each one needs last_checkpoint and its file in OUTPUT_DIR "
                f"({self.cfg.OUTPUT_DIR}): copy them, or use a folder that all of them see."
            )
        if not resuming:
            if resume:
                logger.warning(
                    f"Nothing to resume: OUTPUT_DIR ({self.cfg.OUTPUT_DIR}) has no checkpoint. "
                    "Training starts at iteration 0."
                )
            elif self.checkpointer.has_checkpoint():
                logger.warning(HOLDS_A_RUN.format(self.cfg.OUTPUT_DIR))
                if comm.is_main_process():
                    self.checkpointer.forget_last()
            return
        if self._is_exact():
            batches = self.run_state.batches
            batches = self.start_iter if batches is None else batches
            self.data_loader.start_at(batches, self.run_state.seed)
        self._tell_what_changed()
        if not self.run_state.goes_on:
            how = "The order of the data starts anew: DATALOADER.EXACT_RESUME is or was off."
        elif self.run_state.changed:
            how = "With other settings, it is not the run that it would have been uninterrupted."
        else:
            how = "Data and random numbers go on as if the run had not been interrupted."
        logger.info(f"Resumed at iteration {self.start_iter}. {how}")

    def _tell_what_changed(self):
        changed, settings = self.run_state.changed, self.run_state.settings
        for key, before in list(changed.items())[:_SHOWN]:
            logger.warning(
                f"{key} is {settings[key]}; it was {before} when the checkpoint was "
                f"written{', and the optimizer keeps that' * (key in OF_THE_OPTIMIZER)}."
            )
        if len(changed) > _SHOWN:
            logger.warning(f"{len(changed) - _SHOWN} more settings have changed since then.")


def _is_of_nothing(error: AssertionError) -> bool:
    """Whether what Detectron2 asserts is that a dataset is not empty."""
    return "is empty" in str(error) or "No valid data" in str(error)


@contextmanager
def _own_parts(cfg: CfgNode) -> Iterator[None]:
    """Let Detectron2's trainer build two parts in another way than it does by itself.

    While it builds, and not afterwards: its hooks, and those of a subclass, keep its checkpointer.
    """
    create = create_ddp_model
    if cfg.MODEL.DEVICE == "cpu":  # DDP refuses the GPU index that Detectron2 hands it
        create = partial(create_ddp_model, device_ids=None)
    checkpointer = partial(AtomicCheckpointer, allow_pickle=cfg.MODEL.GLOBALKD.ALLOW_PICKLE)
    with (
        mock.patch.object(defaults, "create_ddp_model", create),
        mock.patch.object(defaults, "DetectionCheckpointer", checkpointer),
    ):
        yield
