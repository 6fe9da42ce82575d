"""When and from what the prototypes are made anew (Alg. 2 of GlobalKD).

`PrototypeRefresher` joins dataset, extraction, generation and bank. It holds settings and a cache
of the chosen images, and no state of training: whether a refresh is due follows from the iteration
alone, so that an interrupted run resumes as if it had not been.
"""

import logging
import math
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import List, Optional, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from .extraction import (
    ExtractionMapper,
    choose_images,
    extract_features,
    extraction_records,
    gather_features,
    isolated_rng,
    usable_boxes,
)
from .features import InstancePooler, LevelPair
from .prototype_bank import PrototypeBank
from .prototype_generation import generate_prototypes
from .structures import PrototypeSet
from .teacher import Teacher

logger = logging.getLogger(__name__)


@dataclass
class GenerationSettings:
    """Arguments of `generate_prototypes`; the keys of MODEL.GLOBALKD.PROTOTYPES."""

    generator: str = "pursuit"
    num_prototypes: int = 10
    lam: float = 10.0
    normalize: bool = True
    density_percentile: float = 0.0
    space: str = "teacher"
    dbscan_eps: float = 2.0
    seed: int = 1

    @staticmethod
    def from_config(cfg: CfgNode) -> "GenerationSettings":
        node = cfg.MODEL.GLOBALKD.PROTOTYPES
        return GenerationSettings(
            generator=node.GENERATOR,
            num_prototypes=node.NUM,
            lam=node.LAMBDA,
            normalize=node.NORMALIZE,
            density_percentile=node.DENSITY_PERCENTILE,
            space=node.SPACE,
            dbscan_eps=node.DBSCAN_EPS,
            seed=node.SEED,
        )


@dataclass
class ImageSource:
    """Where the instances come from, and how images are read."""

    datasets: Sequence[str]
    filter_empty: bool = True
    min_box_size: float = 30.0
    max_images_per_class: int = 800
    seed: int = 1
    image_format: str = "BGR"
    augmentations: Sequence[T.Augmentation] = field(default_factory=list)
    num_workers: int = 0

    @staticmethod
    def from_config(cfg: CfgNode) -> "ImageSource":
        node = cfg.MODEL.GLOBALKD.PROTOTYPES
        resize = T.ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST
        )
        return ImageSource(
            datasets=cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_box_size=node.MIN_BOX_SIZE,
            max_images_per_class=node.MAX_IMAGES_PER_CLASS,
            seed=node.SEED,
            image_format=cfg.INPUT.FORMAT,
            augmentations=[resize] if cfg.INPUT.MIN_SIZE_TEST > 0 else [],
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )


class PrototypeRefresher:
    """Makes prototypes before the first step and every T epochs."""

    @configurable
    def __init__(
        self,
        *,
        source: ImageSource,
        generation: GenerationSettings,
        images_per_batch: int,
        refresh_epochs: float = 1.0,
        file: str = "",
        fingerprint: Optional[dict] = None,
    ):
        """
        Args:
            source: dataset and reading.
            generation: how prototypes are chosen.
            images_per_batch: training images a step over all processes; gives the epoch's length.
            refresh_epochs: T; 0 for only before the first step.
            file: prototypes to start from instead of generating them.
            fingerprint: what `file` must have been made with, and what saved files say.
        """
        if refresh_epochs < 0:
            raise ValueError(
                f"MODEL.GLOBALKD.PROTOTYPES.REFRESH_EPOCHS is {refresh_epochs}; it must be 0 or "
                "more."
            )
        self.source = source
        self.generation = generation
        self.images_per_batch = images_per_batch
        self.refresh_epochs = refresh_epochs
        self.file = file
        self.fingerprint = fingerprint or {}

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.GLOBALKD
        generation = GenerationSettings.from_config(cfg)
        fingerprint = {
            "teacher_config": node.TEACHER.CONFIG_FILE,
            "teacher_weights": node.TEACHER.WEIGHTS,
            "student_weights": cfg.MODEL.WEIGHTS,
            "datasets": list(cfg.DATASETS.TRAIN),
            **{k.lower(): v for k, v in node.PROTOTYPES.items() if k not in _NOT_IN_FINGERPRINT},
        }
        return {
            "source": ImageSource.from_config(cfg),
            "generation": generation,
            "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
            "refresh_epochs": node.PROTOTYPES.REFRESH_EPOCHS,
            "file": node.PROTOTYPES.FILE,
            "fingerprint": fingerprint,
        }

    @cached_property
    def _dataset(self):
        with isolated_rng():
            dicts = get_detection_dataset_dicts(
                list(self.source.datasets), filter_empty=self.source.filter_empty
            )
        table = usable_boxes(dicts, self.source.min_box_size)
        if len(table.boxes) == 0:
            raise ValueError(
                f"No box of {list(self.source.datasets)} (DATASETS.TRAIN) can become a prototype: "
                f"none is at least MODEL.GLOBALKD.PROTOTYPES.MIN_BOX_SIZE = "
                f"{self.source.min_box_size:g} pixels a side."
            )
        images = choose_images(
            table,
            max_images_per_class=self.source.max_images_per_class,
            seed=self.source.seed,
        )
        return len(dicts), extraction_records(dicts, table, images)

    @property
    def records(self) -> List[dict]:
        """The chosen images; see `extraction_records`."""
        return self._dataset[1]

    def is_due(self, iteration: int, bank: PrototypeBank) -> bool:
        """Whether the step of this iteration needs new prototypes first."""
        if not bank.is_ready:
            return True
        if self.refresh_epochs == 0 or iteration == 0:
            return False
        period = self.refresh_epochs * self._dataset[0] / self.images_per_batch
        return math.floor(iteration / period) > math.floor((iteration - 1) / period)

    def refresh(
        self,
        student: nn.Module,
        teacher: Teacher,
        bank: PrototypeBank,
        *,
        levels: Sequence[LevelPair],
        pooler: InstancePooler,
    ) -> Optional[PrototypeSet]:
        """Make prototypes with the present student and put them into the bank of every process.

        Returns:
            What was chosen, on the main process; None elsewhere.
        """
        start = time.perf_counter()
        device = next(student.parameters()).device
        with torch.autocast(device.type, enabled=False):
            features = extract_features(
                student,
                teacher,
                self.records,
                levels=levels,
                pooler=pooler,
                mapper=ExtractionMapper(self.source.augmentations, self.source.image_format),
                input_format=self.source.image_format,
                num_workers=self.source.num_workers,
            )
        features = gather_features(features)
        extracted = time.perf_counter()
        prototypes = _on_main_process(
            lambda: generate_prototypes(
                features,
                num_classes=bank.num_classes,
                device=device,
                progress=sys.stderr.isatty(),
                **vars(self.generation),
            )
        )
        if prototypes is not None:
            bank.update(prototypes)
        bank.broadcast()
        if prototypes is not None:
            _log_refresh(prototypes, len(self.records), extracted - start, start)
        return prototypes

    def load(self, bank: PrototypeBank) -> None:
        """Fill the bank from `file`."""
        bank.load(self.file, expect=self.fingerprint)
        logger.info(f"Prototypes loaded from {self.file}.")


_NOT_IN_FINGERPRINT = ("FILE", "REFRESH_EPOCHS")


def _on_main_process(make) -> Optional[PrototypeSet]:
    """Run on the main process; if it fails there, fail everywhere instead of waiting."""
    result, error = None, None
    if comm.is_main_process():
        try:
            result = make()
        except Exception as e:
            error = e
    failed = comm.all_gather(None if error is None else f"{type(error).__name__}: {error}")[0]
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"Prototype generation failed on the main process: {failed}")
    return result


def _log_refresh(prototypes: PrototypeSet, num_images: int, extraction: float, start: float):
    level = next(iter(prototypes.valid))
    covered = int(prototypes.valid[level].any(dim=1).sum())
    num_classes = len(prototypes.counts)
    total = time.perf_counter() - start
    if has_event_storage():
        storage = get_event_storage()
        storage.put_scalar("kd/classes_covered", covered / num_classes, smoothing_hint=False)
        storage.put_scalar("kd/refresh_seconds", total, smoothing_hint=False)
    logger.info(
        f"Prototypes: {int(prototypes.counts.sum())} instances of {covered} of {num_classes} "
        f"classes in {num_images} images, {len(prototypes.valid)} levels; {total:.1f} s "
        f"({extraction:.1f} s for features)."
    )
    if covered < num_classes:
        logger.warning(
            f"{num_classes - covered} classes have no prototype: their instances are distilled "
            "with reliability 1 and take no part in the global knowledge."
        )
