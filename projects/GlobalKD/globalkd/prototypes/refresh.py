"""When and from what the prototypes are made anew (Alg. 2 of GlobalKD).

`PrototypeRefresher` joins dataset, extraction, generation and bank. It holds settings and a cache
of the chosen images, and no state of training: whether a refresh is due follows from the iteration
alone, so that an interrupted run resumes as if it had not been.

The instances come from a pass over the data, or from the reservoir that training fills. Either
way each process brings its share of them and works on its share of the classes.
"""

import logging
import math
import sys
import time
from functools import cached_property
from typing import Callable, List, Optional, Sequence

import torch
from detectron2.config import configurable
from detectron2.data import get_detection_dataset_dicts
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..data.garbage_collection import paused_collection
from ..features import InstancePooler, LevelPair
from ..random_state import isolated_rng
from ..requirement import require
from ..teacher import Teacher
from .bank import PrototypeBank
from .class_sharding import ClassShard, run_everywhere
from .extraction import (
    ExtractionMapper,
    choose_images,
    extract_features,
    extraction_records,
    usable_boxes,
)
from .fingerprint import fingerprint_settings, with_contents
from .generation import check_settings, generate_prototypes, rows_by_class
from .reservoir import InstanceReservoir
from .settings import GenerationSettings, ImageSource
from .structures import PairedFeatures, PrototypeSet

logger = logging.getLogger(__name__)


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
        mode: str = "pass",
        reservoir_size: int = 256,
        file: str = "",
        settings: Optional[dict] = None,
    ):
        """
        Args:
            source: dataset and reading.
            generation: how prototypes are chosen.
            images_per_batch: training images a step over all processes; gives the epoch's length.
            refresh_epochs: T; 0 for only before the first step.
            mode: "pass" over the dataset at each refresh, or "harvest" what training computes;
                prototypes that a bank has none of come from a pass in any case.
            reservoir_size: for "harvest", the instances that each class keeps in each process.
            file: prototypes to start from instead of generating them.
            settings: what `file` must have been made with; see `fingerprint`.
        """
        for key, value, right, needed in (
            ("REFRESH_EPOCHS", refresh_epochs, refresh_epochs >= 0, "0 or more"),
            ("REFRESH", mode, mode in ("pass", "harvest"), ("pass", "harvest")),
            ("RESERVOIR_SIZE", reservoir_size, reservoir_size >= 1, "1 or more"),
        ):
            require(f"PROTOTYPES.{key}", value, right, needed)
        check_settings(generation)
        self.source = source
        self.generation = generation
        self.images_per_batch = images_per_batch
        self.refresh_epochs = refresh_epochs
        self.mode = mode
        self.reservoir_size = reservoir_size
        self.file = file
        self.settings = settings or {}
        self._dicts: Optional[Sequence[dict]] = None

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.GLOBALKD
        generation = GenerationSettings.from_config(cfg)
        return {
            "source": ImageSource.from_config(cfg),
            "generation": generation,
            "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
            "refresh_epochs": node.PROTOTYPES.REFRESH_EPOCHS,
            "mode": node.PROTOTYPES.REFRESH,
            "reservoir_size": node.PROTOTYPES.RESERVOIR_SIZE,
            "file": node.PROTOTYPES.FILE,
            "settings": fingerprint_settings(cfg),
        }

    @cached_property
    def fingerprint(self) -> dict:
        """What prototypes are made with here, as prototype files carry it."""
        return with_contents(self.settings)

    def read_from(self, dicts: Optional[Sequence[dict]]) -> None:
        """Take the images from these dataset dicts, and do not read `source.datasets` again.

        Args:
            dicts: what `source` describes, as a training loader has it; None: to be read.
        """
        self._dicts = dicts

    @cached_property
    @paused_collection()
    def _dataset(self):
        dicts = self._dicts
        if dicts is None:
            with isolated_rng():
                dicts = get_detection_dataset_dicts(
                    list(self.source.datasets),
                    filter_empty=self.source.filter_empty,
                    min_keypoints=self.source.min_keypoints,
                )
        table = usable_boxes(dicts, self.source.min_box_size)
        if len(table.boxes) == 0:
            raise ValueError(
                f"No box of {list(self.source.datasets)} (DATASETS.TRAIN) can become a prototype: "
                f"of {len(usable_boxes(dicts, 0.0).boxes)} boxes none is at least "
                f"MODEL.GLOBALKD.PROTOTYPES.MIN_BOX_SIZE = {self.source.min_box_size:g} pixels a "
                "side. Lower it below the size of your objects."
            )
        images = choose_images(
            table,
            max_images_per_class=self.source.max_images_per_class,
            seed=self.source.seed,
        )
        left_out = len(set(table.image_ids.tolist())) - len(images)
        if left_out:
            logger.info(
                f"PROTOTYPES.MAX_IMAGES_PER_CLASS = {self.source.max_images_per_class}: prototypes "
                f"come from {len(images)} images; {left_out} more have boxes and are left out."
            )
        return len(dicts), extraction_records(dicts, table, images)

    @property
    def records(self) -> List[dict]:
        """The chosen images; see `extraction_records`."""
        return self._dataset[1]

    @property
    def epoch_iters(self) -> float:
        """Iterations in which training sees each image once."""
        return self._dataset[0] / self.images_per_batch

    def build_reservoir(
        self, levels: Sequence[LevelPair], num_classes: int
    ) -> Optional[InstanceReservoir]:
        """An empty reservoir if refreshes are to read one; else None."""
        if self.mode == "pass" or self.refresh_epochs == 0:
            return None
        return InstanceReservoir(
            levels,
            num_classes=num_classes,
            size=self.reservoir_size,
            min_box_size=self.source.min_box_size,
        )

    def is_due(self, iteration: int, bank: PrototypeBank) -> bool:
        """Whether the step of this iteration needs new prototypes first."""
        if not bank.is_ready:
            return True
        if self.refresh_epochs == 0 or iteration == 0:
            return False
        return math.floor(iteration / self.period) > math.floor((iteration - 1) / self.period)

    @property
    def period(self) -> float:
        """Iterations between two refreshes; 0 for only one, before the first step."""
        return self.refresh_epochs * self.epoch_iters

    def refresh(
        self,
        student: nn.Module,
        teacher: Teacher,
        bank: PrototypeBank,
        *,
        levels: Sequence[LevelPair],
        pooler: InstancePooler,
        num_images: Optional[int] = None,
    ) -> Optional[PrototypeSet]:
        """Make prototypes in a pass over the data and put them into the bank of every process.

        Args:
            num_images: take so many of the chosen images at most, evenly spaced: for a trial.

        Returns:
            What was chosen, on the main process; None elsewhere.

        Raises:
            ValueError: the student's parameters are sharded (FSDP): processes with unequal shares
                of the images would wait for each other for ever.
            RuntimeError: it failed on another process; the message says on which, and with what.
        """
        if any(isinstance(p, DTensor) for p in student.parameters()):
            raise ValueError(
                "The student's parameters are sharded (FSDP), and a pass over the data for "
                "prototypes needs all of them in each process: use DDP, or losses that read no "
                "prototypes, with `use_reliability` off."
            )
        device = next(student.parameters()).device
        source = self.source
        mapper = ExtractionMapper(source.augmentations, student.input_format, source.max_unreadable)

        def extract() -> PairedFeatures:
            step = math.ceil(len(self.records) / (num_images or len(self.records)))
            with torch.autocast(device.type, enabled=False):
                return extract_features(
                    student,
                    teacher,
                    self.records[::step],
                    levels=levels,
                    pooler=pooler,
                    mapper=mapper,
                    num_workers=self.source.num_workers,
                    folder=self.source.feature_dir,
                )

        return self._renew(extract, bank, device)

    def refresh_from(
        self, reservoir: InstanceReservoir, bank: PrototypeBank, iteration: int
    ) -> Optional[PrototypeSet]:
        """`refresh` with what training left in the reservoir during the last epoch."""
        since = math.ceil(iteration - self.epoch_iters)
        return self._renew(lambda: reservoir.features(since), bank, reservoir.boxes.device)

    def _renew(
        self, extract: Callable[[], PairedFeatures], bank: PrototypeBank, device: torch.device
    ) -> Optional[PrototypeSet]:
        start = time.perf_counter()

        def checked() -> PairedFeatures:
            features = extract()
            rows_by_class(features.classes, bank.num_classes)  # raises for a class out of range
            return features

        features = run_everywhere(checked, "Extracting instance features")
        extracted = time.perf_counter()
        shard = ClassShard.exchange(features, bank.num_classes)
        prototypes = run_everywhere(
            lambda: generate_prototypes(
                shard.features,
                self.generation,
                num_classes=bank.num_classes,
                device=device,
                progress=comm.is_main_process() and sys.stderr.isatty(),
            ),
            "Prototype generation",
        )
        prototypes = shard.collect(prototypes)
        if prototypes is not None:
            bank.update(prototypes)
        bank.broadcast()
        if not bank.is_ready:  # or each step would begin with another pass
            raise ValueError(
                "None of the instance features can become a prototype: all are (almost) zero in "
                "one of the two feature spaces. Are the student's weights (MODEL.WEIGHTS) and the "
                "teacher's those of a trained backbone?"
            )
        if prototypes is not None:
            _log_refresh(prototypes.counts, bank, extracted - start, time.perf_counter() - start)
        return prototypes

    def load(self, bank: PrototypeBank) -> None:
        """Fill the bank of every process from `file`, which the main process alone reads."""

        def read() -> None:
            if comm.is_main_process():
                bank.load(self.file, expect=self.fingerprint)

        run_everywhere(read, "Reading PROTOTYPES.FILE")
        bank.broadcast()
        logger.info(f"Prototypes loaded from {self.file}.")


def _log_refresh(counts: Tensor, bank: PrototypeBank, extraction: float, total: float) -> None:
    level = next(iter(bank.levels))
    covered = int(bank.valid(level).any(dim=1).sum())
    if has_event_storage():
        storage = get_event_storage()
        storage.put_scalar("kd/classes_covered", covered / len(counts), smoothing_hint=False)
        storage.put_scalar("kd/refresh_seconds", total, smoothing_hint=False)
    logger.info(
        f"Prototypes of {covered} of {len(counts)} classes on {len(bank.levels)} levels, from "
        f"{int(counts.sum())} instances; {total:.1f} s ({extraction:.1f} s for features)."
    )
    if covered < len(counts):
        logger.warning(
            f"{len(counts) - covered} classes have no prototype: their instances are distilled "
            "with reliability 1 and take no part in the global knowledge."
        )
