"""Building a teacher: its config, the gate that its weights pass, its norms folded away."""

import contextlib
import logging
import os
from typing import List, Optional, Sequence

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..config_reading import load_config
from ..data.class_names import class_names
from ..safe_loading import SafeCheckpointer, require_weights
from ..sparse_roi_align import TeacherROIAlign
from .backbone_pass import has_tf32, is_resnet
from .teacher import Teacher

logger = logging.getLogger(__name__)


def build_teacher(
    config_file: str,
    weights: str = "",
    opts: Sequence[str] = (),
    *,
    allow_random_weights: bool = False,
    allow_pickle: bool = False,
    device: str = "",
    like: Optional[CfgNode] = None,
    stock: bool = False,
    **settings,
) -> Teacher:
    """Build a teacher from a Detectron2 config and load its weights through the gate.

    The batch norms of its backbone are folded into its convolutions. On a CPU, the weights of all
    its convolutions have the channels_last layout and its boxes are pooled by `sparse_roi_align`;
    on a GPU with TF32, those of a ResNet and its FPN have that layout.

    Args:
        config_file: a YAML file, or a model-zoo name.
        weights: a checkpoint; empty for what the config names (a zoo name: the zoo's checkpoint).
        opts: overrides, `["KEY", "VALUE", ...]`.
        allow_random_weights: accept missing or incomplete weights, with a warning; empty `weights`
            then mean none.
        allow_pickle: accept weights whose reading may run code that is in the file.
        device: where to build it; empty for what the config says.
        like: a config with further keys that the teacher's may have; see `load_config`.
        stock: leave the detector as Detectron2 builds it.
        settings: `classes`, `precision`, `compile`, `input_scale`, `side_stream` and `cuda_graphs`
            of `Teacher`.

    Raises:
        FileNotFoundError: the config or the weights are not there.
        ValueError: the weights do not fill the detector, or it has not the `classes`.
    """
    cfg = teacher_config(config_file, opts, like)
    if device:
        cfg.MODEL.DEVICE = device
    if not weights and not allow_random_weights:
        weights = _default_weights(config_file, cfg)
    cfg.MODEL.WEIGHTS = weights
    model = build_model(cfg)
    load_teacher_weights(
        model, cfg.MODEL.WEIGHTS, allow_random=allow_random_weights, allow_pickle=allow_pickle
    )
    if not stock:
        _accelerate(model)
    return Teacher(model, input_format=cfg.INPUT.FORMAT, class_names=_class_names(cfg), **settings)


def _accelerate(model: nn.Module) -> None:
    # A pyramid's norms stay: a student may inherit its weights (`pairing.inherit_heads`).
    fold_norms(getattr(model.backbone, "bottom_up", model.backbone))
    TeacherROIAlign.replace_in(model)
    if model.device.type == "cpu":
        model.to(memory_format=torch.channels_last)
    elif is_resnet(model.backbone) and has_tf32(model.device):
        model.backbone.to(memory_format=torch.channels_last)


def teacher_from_config(cfg: CfgNode, *, stock: bool = False) -> Teacher:
    """Build the teacher that MODEL.GLOBALKD.TEACHER of a student's config describes."""
    node = cfg.MODEL.GLOBALKD.TEACHER
    if not stock:
        _warn_of_image_sizes(cfg, teacher_config(node.CONFIG_FILE, node.OPTS, cfg))
    return build_teacher(
        node.CONFIG_FILE,
        node.WEIGHTS,
        node.OPTS,
        allow_random_weights=node.ALLOW_RANDOM_WEIGHTS,
        allow_pickle=cfg.MODEL.GLOBALKD.ALLOW_PICKLE,
        device=cfg.MODEL.DEVICE,
        like=cfg,
        stock=stock,
        classes=node.CLASSES,
        precision=node.PRECISION,
        compile=node.COMPILE,
        input_scale=node.INPUT_SCALE,
        side_stream=node.SIDE_STREAM,
        cuda_graphs=node.CUDA_GRAPHS,
    )


def _warn_of_image_sizes(cfg: CfgNode, teacher: CfgNode) -> None:
    """Warn where a teacher sees none of the sizes that its config trained it at, nor nearly so."""
    if 0 in (*cfg.INPUT.MIN_SIZE_TRAIN, *teacher.INPUT.MIN_SIZE_TRAIN):  # images as they are
        return
    if cfg.INPUT.CROP.ENABLED or teacher.INPUT.CROP.ENABLED:
        return
    scale = cfg.MODEL.GLOBALKD.TEACHER.INPUT_SCALE
    own, known = (_short_sides(x.INPUT) for x in (cfg, teacher))
    shown = [side * scale for side in own]
    if shown[1] * _NEARLY >= known[0] and shown[0] <= known[1] * _NEARLY:
        return
    logger.warning(
        f"The teacher sees images with a short side of {_span(shown)} pixels "
        f"(INPUT.MIN_SIZE_TRAIN, times MODEL.GLOBALKD.TEACHER.INPUT_SCALE {scale:g}), but its "
        f"config trained it with {_span(known)}: at another size it teaches worse. If the losses "
        f"allow it, set INPUT_SCALE {sum(known) / sum(own):.2g}, or take a teacher that was "
        "trained at this size."
    )


#: By what factor the sizes of images may differ without a warning.
_NEARLY = 1.25


def _short_sides(node: CfgNode) -> List[float]:
    sides = [min(side, node.MAX_SIZE_TRAIN) for side in node.MIN_SIZE_TRAIN]
    return [min(sides), max(sides)]


def _span(sides: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{side:.4g}" for side in sides))


def teacher_weights(cfg: CfgNode) -> str:
    """The checkpoint of the teacher that a student's config describes; "" for random weights."""
    node = cfg.MODEL.GLOBALKD.TEACHER
    if node.WEIGHTS or node.ALLOW_RANDOM_WEIGHTS:
        return node.WEIGHTS
    return _default_weights(node.CONFIG_FILE, teacher_config(node.CONFIG_FILE, node.OPTS, cfg))


def teacher_config(
    config_file: str, opts: Sequence[str] = (), like: Optional[CfgNode] = None
) -> CfgNode:
    """Read a teacher's config from a file or by its model-zoo name; `like` as in `load_config`."""
    path = config_file
    if not os.path.isfile(path):
        with contextlib.suppress(RuntimeError):  # not in the zoo
            path = model_zoo.get_config_file(config_file)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"MODEL.GLOBALKD.TEACHER.CONFIG_FILE is {config_file!r}: neither a file (seen from "
            f"{os.getcwd()}) nor a model-zoo name such as "
            "'COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml'."
        )
    if path.endswith(".py"):
        raise ValueError(
            f"MODEL.GLOBALKD.TEACHER.CONFIG_FILE is {config_file!r}, a LazyConfig; a teacher in a "
            "YAML configuration needs a YAML file. With LazyConfig, give the Distiller a Teacher "
            "of the model that you built (configs/lazy/)."
        )
    cfg = load_config(path, opts, like, opts_of="MODEL.GLOBALKD.TEACHER.OPTS")
    cfg.MODEL.GLOBALKD.ENABLED = False
    return cfg


def _default_weights(config_file: str, cfg: CfgNode) -> str:
    if os.path.isfile(config_file):
        return cfg.MODEL.WEIGHTS
    return model_zoo.get_checkpoint_url(config_file)


def _class_names(cfg: CfgNode) -> List[str]:
    reason = f"DATASETS.TRAIN of its config: {list(cfg.DATASETS.TRAIN)}"
    try:
        names = class_names(cfg, cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else []
    except ValueError as error:  # what is wrong with the teacher's data need not concern this run
        names, reason = [], str(error)
    if not names:
        logger.warning(
            f"The names of the teacher's classes are not known ({reason}), so that they are not "
            "compared with the student's."
        )
    return names


def load_teacher_weights(
    model: nn.Module, weights: str, *, allow_random: bool = False, allow_pickle: bool = False
) -> None:
    """Load a checkpoint and refuse it unless every entry of the detector was filled.

    A backbone's entries that it has no place for are refused, too; those of other heads are not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: entries stayed unfilled or were left over, and the message names them; or the
            file holds more than tensors and plain values.
    """
    if not weights:
        _refuse("MODEL.GLOBALKD.TEACHER.WEIGHTS is empty, and its config names none", allow_random)
        return
    require_weights(
        "MODEL.GLOBALKD.TEACHER.WEIGHTS",
        weights,
        " Train the teacher first, or name a checkpoint; only to evaluate, set "
        "MODEL.GLOBALKD.ENABLED False.",
    )
    checkpointer = SafeCheckpointer(model, allow_pickle=allow_pickle)
    checkpointer.load(weights)
    if checkpointer.unfilled:
        _refuse(
            f"MODEL.GLOBALKD.TEACHER.WEIGHTS ({weights}) "
            f"{checkpointer.describe_unfilled('the teacher')}. TEACHER.CONFIG_FILE and "
            "TEACHER.OPTS must be what the weights were trained with, its number of classes too",
            allow_random,
        )
    else:
        logger.info(f"Teacher: every entry loaded from {weights}.")
    if checkpointer.unused_of_backbone and not allow_random:
        raise ValueError(
            f"MODEL.GLOBALKD.TEACHER.WEIGHTS ({weights}) "
            f"{checkpointer.describe_unused('the teacher')} Give the config that the weights were "
            "trained with."
        )


def _refuse(problem: str, allow_random: bool) -> None:
    if not allow_random:
        raise ValueError(
            f"{problem}. A teacher with random weights teaches nothing; to try things out all the "
            "same, set MODEL.GLOBALKD.TEACHER.ALLOW_RANDOM_WEIGHTS True."
        )
    logger.warning(f"{problem}. Going on: ALLOW_RANDOM_WEIGHTS is True.")


def fold_norms(module: nn.Module) -> None:
    """Put the batch norms of a frozen detector into the convolutions before them, in place.

    The same function up to rounding, with less work: a norm with fixed statistics is a scale and a
    shift of its channels. Only Detectron2's `Conv2d` says which norm follows it; other norms stay.
    """
    for conv in module.modules():
        norm = getattr(conv, "norm", None) if isinstance(conv, Conv2d) else None
        fixed = isinstance(norm, (FrozenBatchNorm2d, _BatchNorm)) and norm.running_mean is not None
        if not fixed:
            continue
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        conv.norm = None
    module.requires_grad_(False)
