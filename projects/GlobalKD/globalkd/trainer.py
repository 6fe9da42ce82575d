"""Detectron2's DefaultTrainer with a distiller: checkpoint entry, evaluators, hooks.

The same trainer trains a teacher, a plain student and a distilled one; the configuration decides.
"""

import logging
import os
from functools import partial
from typing import List, Optional
from unittest import mock

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, defaults
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm

from .distiller import Distiller
from .evaluation import build_evaluator
from .hooks import PrototypeRefresh, TeacherEvaluation

logger = logging.getLogger(__name__)


class DistillTrainer(DefaultTrainer):
    """`DefaultTrainer` for distilling and for stock meta-architectures alike.

    A checkpoint's "model" entry is the stock detector; "distiller" holds adapters and prototypes.
    """

    def __init__(self, cfg: CfgNode):
        with _ddp_on_any_device(cfg):
            super().__init__(cfg)
        if self.distiller is not None:
            self.checkpointer.add_checkpointable("distiller", self.distiller)
            # Hooks run in the order of their list: prototypes come before the step's timer.
            self._hooks.insert(0, self._adopt(PrototypeRefresh()))
            check_classes(cfg, self.distiller.teacher.class_names)

    @property
    def distiller(self) -> Optional[Distiller]:
        model = getattr(self.model, "module", self.model)
        return getattr(model, "distiller", None)

    def _adopt(self, hook: HookBase) -> HookBase:
        hook.trainer = self
        return hook

    def build_hooks(self) -> List[HookBase]:
        hooks = super().build_hooks()
        count = self.cfg.MODEL.GLOBALKD.TEACHER.EVAL_IMAGES
        if self.distiller is not None and count > 0:
            hooks.insert(0, TeacherEvaluation(lambda: self.evaluate_teacher(count)))
        return hooks

    def evaluate_teacher(self, num_images: int) -> dict:
        """Results of the teacher on the first images of the first test dataset."""
        name = first_images(self.cfg.DATASETS.TEST[0], num_images)
        teacher_cfg = self.cfg.clone()
        teacher_cfg.defrost()
        teacher_cfg.INPUT.FORMAT = self.distiller.teacher.input_format
        loader = build_detection_test_loader(teacher_cfg, name)
        folder = os.path.join(self.cfg.OUTPUT_DIR, "teacher")
        return inference_on_dataset(
            self.distiller.teacher.model, loader, build_evaluator(self.cfg, name, folder)
        )

    @classmethod
    def build_train_loader(cls, cfg):
        try:
            return super().build_train_loader(cfg)
        except AssertionError as error:  # Detectron2's way to say that a dataset is empty
            raise ValueError(
                f"DATASETS.TRAIN = {list(cfg.DATASETS.TRAIN)} gives no image to train on: {error}"
            ) from error

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return build_evaluator(cfg, dataset_name, output_folder)

    def resume_or_load(self, resume: bool = True):
        resuming = resume and self.checkpointer.has_checkpoint()
        super().resume_or_load(resume=resume)
        if not resuming or self.distiller is None:
            return
        logger.info(f"Resumed at iteration {self.start_iter}.")
        if self.distiller.bank is not None and not self.distiller.bank.is_ready:
            logger.warning(
                "The checkpoint has no entry 'distiller': it was not written by this trainer. "
                "Adapters start anew and prototypes are made again."
            )


def _ddp_on_any_device(cfg: CfgNode):
    """Detectron2 hands DDP a GPU index, which DDP refuses for a model on the CPU."""
    create = create_ddp_model
    if cfg.MODEL.DEVICE == "cpu":
        create = partial(create_ddp_model, device_ids=None)
    return mock.patch.object(defaults, "create_ddp_model", create)


def fall_back_to_cpu(cfg: CfgNode) -> None:
    """Set MODEL.DEVICE to cpu, with a warning, where it is cuda and there is no GPU."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning(f"No GPU here: MODEL.DEVICE is cpu instead of {cfg.MODEL.DEVICE}.")
        cfg.MODEL.DEVICE = "cpu"


def first_images(dataset: str, count: int) -> str:
    """Register the first images of a dataset under a name of their own; return the name."""
    name = f"{dataset}_first_{count}"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, lambda: DatasetCatalog.get(dataset)[:count])
        metadata = MetadataCatalog.get(dataset).as_dict()
        dropped = ("name", "json_file")  # the evaluator writes its own JSON of what is there
        kept = {k: v for k, v in metadata.items() if k not in dropped}
        if metadata.get("evaluator_type") == "pascal_voc":
            # Detectron2's own evaluator would count the whole split as missed.
            kept.setdefault("globalkd_source", [dataset, count])
        MetadataCatalog.get(name).set(**kept)
    return name


def check_classes(cfg: CfgNode, teacher_classes: List[str]) -> None:
    """Compare the class names of the training data, the test data and the teacher.

    Raises:
        ValueError: they differ, and MODEL.GLOBALKD.TEACHER.ALLOW_OTHER_CLASSES is not set.
    """
    lists = {f"dataset {d}": _class_names(d) for d in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}
    lists["the teacher"] = list(teacher_classes)
    known = {owner: names for owner, names in lists.items() if names}
    if len({tuple(names) for names in known.values()}) <= 1:
        return
    described = "; ".join(
        f"{owner} has {len(names)}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for owner, names in known.items()
    )
    problem = f"The class lists differ: {described}"
    if not cfg.MODEL.GLOBALKD.TEACHER.ALLOW_OTHER_CLASSES:
        raise ValueError(
            f"{problem}. Set MODEL.GLOBALKD.TEACHER.ALLOW_OTHER_CLASSES True if that is meant."
        )
    if comm.is_main_process():
        logger.warning(f"{problem}. Going on: ALLOW_OTHER_CLASSES is True.")


def _class_names(dataset: str) -> List[str]:
    return list(MetadataCatalog.get(dataset).get("thing_classes", []))
