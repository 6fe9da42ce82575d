"""What must hold before a run begins, and what its number of processes makes of its schedule.

Not here: the datasets (`data/config_checks`), the keys (`config_reading`), the pair of detectors
(`pairing`).
"""

import logging
import os
import re
from contextlib import suppress

import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

from ..meta_arch import is_distilled
from ..safe_loading import require_weights
from ..teacher.building import teacher_weights

logger = logging.getLogger(__name__)

HOLDS_A_RUN = (
    "OUTPUT_DIR {} holds a run already. Without --resume, its checkpoints of the same names are "
    "replaced, its last_checkpoint is removed, so that a resume goes on from the new run's, and "
    "new records are appended to its metrics.json."
)


def check_schedule(cfg: CfgNode) -> None:
    """Raise a ValueError where there is no step to train, or none after which to save."""
    for key in ("MAX_ITER", "CHECKPOINT_PERIOD"):
        if cfg.SOLVER[key] < 1:
            raise ValueError(f"SOLVER.{key} is {cfg.SOLVER[key]}; it must be 1 or more.")


def require_output(cfg: CfgNode) -> None:
    """Raise a ValueError where a run has no folder to write to."""
    if not cfg.OUTPUT_DIR:
        raise ValueError("OUTPUT_DIR is empty; it must name a folder, such as output/my_run.")
    parent = os.path.abspath(cfg.OUTPUT_DIR)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise ValueError(f"OUTPUT_DIR is {cfg.OUTPUT_DIR!r}, but {parent} is a file.")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"OUTPUT_DIR is {cfg.OUTPUT_DIR!r}, but {parent} cannot be written to.")


def require_start(cfg: CfgNode) -> None:
    """Check the weights that a training starts from; a warning where some stay random.

    Raises:
        FileNotFoundError: MODEL.WEIGHTS names a file that is not there.
    """
    if cfg.MODEL.WEIGHTS:
        require_weights("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS)
        return
    frozen = cfg.MODEL.RESNETS.NORM == "FrozenBN" or cfg.MODEL.BACKBONE.FREEZE_AT > 0
    if frozen and "resnet" in cfg.MODEL.BACKBONE.NAME:
        logger.warning(
            "MODEL.WEIGHTS is empty, and a part of the backbone that stays random is frozen "
            f"(MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT}, MODEL.RESNETS.NORM "
            f"{cfg.MODEL.RESNETS.NORM}): such a training usually diverges. Name the weights of a "
            "detector or a backbone; or, to train from scratch, set FREEZE_AT 0 and NORM BN."
        )


def check_output(cfg: CfgNode) -> None:
    """Raise a ValueError where a training would write its checkpoints over its teacher's."""
    require_output(cfg)
    teacher = ""
    if cfg.MODEL.GLOBALKD.ENABLED:
        # A teacher's config that cannot be read is an error where the teacher is built.
        with suppress(FileNotFoundError, ValueError, RuntimeError):
            teacher = teacher_weights(cfg)
    folder, name = os.path.split(teacher)
    same = os.path.realpath(folder) == os.path.realpath(cfg.OUTPUT_DIR)
    if same and re.fullmatch(r"model_(final|last|\d+)\.pth", name):
        raise ValueError(
            f"OUTPUT_DIR ({cfg.OUTPUT_DIR}) is where the teacher's weights lie ({teacher}): the "
            "student's would replace them. Give the run another OUTPUT_DIR."
        )


def warn_of_idle_teacher(cfg: CfgNode) -> None:
    """Warn where a config names a teacher and a meta-architecture that does not distil."""
    node = cfg.MODEL.GLOBALKD
    if node.ENABLED and node.TEACHER.CONFIG_FILE and not is_distilled(cfg):
        logger.warning(
            f"MODEL.GLOBALKD.TEACHER.CONFIG_FILE names a teacher, but MODEL.META_ARCHITECTURE is "
            f"{cfg.MODEL.META_ARCHITECTURE!r}, which does not distil. Set it to "
            "'DistillGeneralizedRCNN' or 'DistillRetinaNet', or MODEL.GLOBALKD.ENABLED to False."
        )


def check_evaluations(cfg: CfgNode) -> None:
    """Raise a ValueError where there is nothing to evaluate a teacher on; warn of what is not done.

    Detectron2's own trainer leaves test-time augmentation to its script, and so does this one.
    """
    count = cfg.MODEL.GLOBALKD.TEACHER.EVAL_IMAGES
    if count > 0 and is_distilled(cfg) and not cfg.DATASETS.TEST:
        raise ValueError(
            f"MODEL.GLOBALKD.TEACHER.EVAL_IMAGES is {count}, and DATASETS.TEST is empty: there is "
            "nothing to evaluate the teacher on."
        )
    if cfg.TEST.AUG.ENABLED:
        logger.warning(
            "TEST.AUG.ENABLED has no effect: evaluations here do without test-time augmentation. "
            "The exported student can be given to Detectron2's GeneralizedRCNNWithTTA."
        )


def check_device(cfg: CfgNode) -> None:
    """Raise a ValueError where several processes are to train on what they cannot talk about."""
    several = comm.get_world_size() > 1
    if several and not cfg.MODEL.DEVICE.startswith("cuda") and dist.get_backend() == "nccl":
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, and these {comm.get_world_size()} processes "
            "talk by NCCL, which reaches GPUs alone. Start with CUDA_VISIBLE_DEVICES= (nothing) to "
            "train in several processes on the CPU."
        )


def check_batch(cfg: CfgNode, num_processes: int) -> None:
    """Raise a ValueError where the images of a step cannot be shared equally."""
    if cfg.SOLVER.IMS_PER_BATCH < 1:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be 1 or more."
        )
    if cfg.SOLVER.IMS_PER_BATCH % num_processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be a multiple of the "
            f"number of processes, here {num_processes}, since each takes its share."
        )


def scale_to_processes(cfg: CfgNode, num_processes: int) -> CfgNode:
    """What SOLVER.REFERENCE_WORLD_SIZE asks for, of Detectron2's keys and of the distillation's.

    Returns:
        The config itself where nothing is to be scaled, else another one.

    Raises:
        ValueError: SOLVER.IMS_PER_BATCH is no multiple of SOLVER.REFERENCE_WORLD_SIZE.
    """
    solver = cfg.SOLVER
    if solver.REFERENCE_WORLD_SIZE and solver.IMS_PER_BATCH % solver.REFERENCE_WORLD_SIZE:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}; it must be a multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE, {solver.REFERENCE_WORLD_SIZE}."
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, num_processes)
    if scaled is not cfg:
        scaled.defrost()
        node, factor = scaled.MODEL.GLOBALKD, solver.REFERENCE_WORLD_SIZE / num_processes
        node.WARMUP_ITERS = round(node.WARMUP_ITERS * factor)
        node.ICD.START_ITER = round(node.ICD.START_ITER * factor)
        if node.STOP_ITER:  # 0 would be "never"
            node.STOP_ITER = max(round(node.STOP_ITER * factor), 1)
        if cfg.is_frozen():
            scaled.freeze()
    return scaled
