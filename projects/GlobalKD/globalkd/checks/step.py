"""What a training step takes, and a whole run of them.

Pure measurements on a trainer; what they mean is judged in `cost`. Not here: the distillation
terms of a step (`terms`).
"""

import math
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Callable, Dict

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.utils.events import EventStorage
from torch import nn

from ..data.registration import first_images
from ..engine.trainer import DistillTrainer


def run_step(trainer: DistillTrainer) -> float:
    """Seconds of one whole step with its data, at iteration 0."""
    trainer.iter = trainer.start_iter = 0
    with EventStorage(0) as trainer.storage:
        return _seconds(trainer.run_step)


def time_steps(trainers: Dict[str, DistillTrainer], steps: int) -> Dict[str, float]:
    """Median seconds of a step of each trainer, taken in turns after one that does not count."""
    for trainer in trainers.values():
        run_step(trainer)
    times = [{name: run_step(trainer) for name, trainer in trainers.items()} for _ in range(steps)]
    return {name: statistics.median(row[name] for row in times) for name in trainers}


def time_inference(model: nn.Module, cfg: CfgNode, images: int) -> float:
    """Seconds that the detector takes for one test image, without its reading; 0 without a set."""
    if not cfg.DATASETS.TEST:
        return 0.0
    loader = build_detection_test_loader(cfg, first_images(cfg.DATASETS.TEST[0], images))
    model.eval()
    with torch.no_grad():
        times = [_seconds(lambda inputs=inputs: model(inputs)) for inputs in loader]
    model.train()
    return statistics.median(times)


def _seconds(work: Callable) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def on_gpu(device: str) -> bool:
    """Whether MODEL.DEVICE names a GPU."""
    return device.startswith("cuda")


def peak_memory(device: str) -> float:
    """GiB: the largest amount so far, of the GPU's memory or else of the process's."""
    if on_gpu(device):
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # Linux counts in KiB


@dataclass
class Forecast:
    """Seconds of a whole run by what they are spent on, and how often each part comes."""

    steps: float
    refreshes: float
    evaluations: float
    num_refreshes: int
    num_evaluations: int

    @property
    def total(self) -> float:
        return self.steps + self.refreshes + self.evaluations


def forecast(
    cfg: CfgNode, *, step: float, refresh: float, period: float, image: float, num_gpus: int
) -> Forecast:
    """What a run will take; passes over data are shared by all processes, steps are not.

    Args:
        cfg: SOLVER.MAX_ITER, TEST.EVAL_PERIOD, DATASETS.TEST and MODEL.GLOBALKD.STOP_ITER are read.
        step: seconds of a step.
        refresh: seconds of a refresh on one process; 0 without prototypes.
        period: iterations between two refreshes; 0 for only one. Below 1: one before each step.
        image: seconds of a test image on one process.
        num_gpus: processes of the run.
    """
    iterations = cfg.SOLVER.MAX_ITER
    distilled = min(iterations, cfg.MODEL.GLOBALKD.STOP_ITER or iterations)
    later = math.floor((distilled - 1) / max(period, 1)) if period else 0
    num_refreshes = int(refresh > 0) * (1 + later)
    images = sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TEST)
    # Detectron2 evaluates after every period, and once at the end in any case.
    num_evaluations = 1
    if cfg.TEST.EVAL_PERIOD > 0:
        num_evaluations += (iterations - 1) // cfg.TEST.EVAL_PERIOD
    return Forecast(
        steps=iterations * step,
        refreshes=num_refreshes * refresh / num_gpus,
        evaluations=num_evaluations * images * image / num_gpus,
        num_refreshes=num_refreshes,
        num_evaluations=num_evaluations,
    )
