"""Everything that can be known of a run before it starts: what `tools/check.py` reports.

Each part looks at one thing and reports what it found; a part that fails is a problem of the run,
and the parts that do not depend on it still run. Here: the order of the parts, and what the keys
say about each other. Not here: datasets, detectors and cost (`data`, `detectors`, `cost`),
and the measurements (`step`, `terms`).
"""

import os
import tempfile
from importlib.util import find_spec
from typing import Callable, Optional, Tuple

from detectron2.config import CfgNode
from torch import nn

from ..engine.run_checks import (
    HOLDS_A_RUN,
    check_batch,
    check_evaluations,
    check_output,
    scale_to_processes,
)
from ..engine.trainer import DistillTrainer
from .cost import check_cost
from .data import check_datasets, register_each
from .detectors import check_detectors
from .report import CheckReport


def check_run(
    cfg: CfgNode,
    *,
    steps: int = 3,
    prototype_images: int = 64,
    num_gpus: int = 1,
    echo: Callable[[str], None] = print,
) -> CheckReport:
    """Check a configuration, distilling or not, as `train_net.py` would run it without --resume.

    Nothing is written. The memory of a second, plain student is needed for its timing.

    Args:
        cfg: a complete configuration; it is not changed.
        steps: training steps that are timed, with and without distillation.
        prototype_images: images from which trial prototypes are made.
        num_gpus: processes that the run is to have; this one takes its share of a batch.
        echo: gets the text of each part as it is ready.
    """
    report = CheckReport(echo)
    num_gpus = max(num_gpus, 1)  # 0 is one process, as it is for train_net.py
    cfg = cfg.clone()
    with report.part("SOLVER.REFERENCE_WORLD_SIZE"):
        cfg = scale_to_processes(cfg, num_gpus)
    cfg.defrost()
    with report.log_warnings(), tempfile.TemporaryDirectory() as folder:
        check_settings(cfg, report)
        with report.part("--num-gpus"):
            check_batch(cfg, num_gpus)
        cfg.OUTPUT_DIR = folder
        cfg.MODEL.GLOBALKD.TEACHER.EVAL_IMAGES = 0  # done, and test sets may be taken out below
        cfg.WANDB.ENABLED = False  # a check is no run that one wants to see there
        cfg.SOLVER.REFERENCE_WORLD_SIZE = 0  # its part is done
        cfg.SOLVER.IMS_PER_BATCH = max(cfg.SOLVER.IMS_PER_BATCH // num_gpus, 1)
        for error in register_each(cfg):
            report.problem(f"Datasets: {error}")
        readable = check_datasets(cfg, report, num_gpus)
        trainer, model = build(cfg, report, with_data=readable)
        if model is not None:
            check_detectors(model, cfg, report)
        if trainer is not None:
            check_cost(trainer, cfg, report, steps, prototype_images, num_gpus)
    report.finish()
    return report


def check_settings(cfg: CfgNode, report: CheckReport) -> None:
    """What the keys say about each other."""
    node, iterations = cfg.MODEL.GLOBALKD, cfg.SOLVER.MAX_ITER
    if iterations < node.STOP_ITER:
        report.warn(
            f"MODEL.GLOBALKD.STOP_ITER ({node.STOP_ITER}) is past SOLVER.MAX_ITER ({iterations}): "
            "distillation never stops."
        )
    end = min(iterations, node.STOP_ITER or iterations)
    if end <= node.WARMUP_ITERS:
        report.warn(
            f"MODEL.GLOBALKD.WARMUP_ITERS ({node.WARMUP_ITERS}) is not below the {end} iterations "
            "with distillation: it never reaches its full weight."
        )
    if "ICD" in node.LOSSES and node.ICD.WEIGHT > 0 and end <= node.ICD.START_ITER:
        report.warn(
            f"MODEL.GLOBALKD.ICD.START_ITER ({node.ICD.START_ITER}) is not below the {end} "
            "iterations with distillation: ICD never teaches the student."
        )
    late = [step for step in cfg.SOLVER.STEPS if step >= iterations]
    if late:
        report.warn(
            f"SOLVER.STEPS {late} are not before SOLVER.MAX_ITER ({iterations}): the learning rate "
            "is not lowered there."
        )
    with report.part("OUTPUT_DIR"):
        check_output(cfg)
    with report.part("Evaluations"):
        check_evaluations(cfg)
    if os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        report.warn(HOLDS_A_RUN.format(cfg.OUTPUT_DIR))
    if cfg.WANDB.ENABLED and find_spec("wandb") is None:
        report.problem("WANDB.ENABLED is True, but the package wandb is not installed.")


def build(
    cfg: CfgNode, report: CheckReport, *, with_data: bool
) -> Tuple[Optional[DistillTrainer], Optional[nn.Module]]:
    """The trainer, or only the model where data cannot be read; None for what cannot be built.

    Where the teacher's weights or classes are refused, a second try without them finds out what
    else is wrong.
    """
    report.echo("\nBuilding ...")

    def attempt():
        if not with_data:
            return None, DistillTrainer.build_model(cfg)
        trainer = DistillTrainer(cfg)
        return trainer, trainer.model

    with report.part("Building"):
        return attempt()
    teacher = cfg.MODEL.GLOBALKD.TEACHER
    teacher.WEIGHTS, teacher.ALLOW_RANDOM_WEIGHTS, teacher.ALLOW_OTHER_CLASSES = "", True, True
    with report.part("Building"), report.trial():
        return attempt()
    return None, None
