"""The detectors of a configuration: their weights, their classes, their levels."""

from detectron2.config import CfgNode
from tabulate import tabulate
from torch import nn

from ..engine.run_checks import require_start
from ..safe_loading import SafeCheckpointer
from .report import CheckReport, shortened


def check_detectors(model: nn.Module, cfg: CfgNode, report: CheckReport) -> None:
    """Weights of the student, of the teacher, and the pairing of their levels."""
    lines = [f"student: {_parameters(model.backbone)} in its backbone"]
    with report.part("MODEL.WEIGHTS"):
        require_start(cfg)
        allow_pickle = cfg.MODEL.GLOBALKD.ALLOW_PICKLE
        start = load_student(model, cfg.MODEL.WEIGHTS, report, allow_pickle=allow_pickle)
        lines.append("student: " + start)
    distiller = getattr(model, "distiller", None)
    if distiller is None:
        lines.append(f"no teacher: nothing is distilled by {cfg.MODEL.META_ARCHITECTURE}")
        report.section("Detectors", *lines)
        return
    teacher = distiller.teacher
    lines.append(f"teacher: {_parameters(teacher.model.backbone)} in its backbone")
    loaded = cfg.MODEL.GLOBALKD.TEACHER.WEIGHTS or "its config's weights"
    if cfg.MODEL.GLOBALKD.TEACHER.ALLOW_RANDOM_WEIGHTS:
        lines.append("teacher: its weights are not checked, random ones are allowed")
    else:
        lines.append(f"teacher: every entry filled from {loaded}")
    names = teacher.class_names
    lines.append(f"teacher: {teacher.num_classes} classes" + (": " if names else "")
                 + shortened(names))  # fmt: skip
    report.section("Detectors", *lines)
    shapes, pairs = model.backbone.output_shape(), {p.student: p for p in distiller.levels}
    rows = []
    for name, shape in shapes.items():
        pair = pairs.get(name)
        there = (pair.teacher, pair.teacher_channels, _adapters(distiller, name)) if pair else ()
        rows.append((name, shape.stride, shape.channels, *(there or ("-", "-", "not distilled"))))
    heads = ["student", "stride", "width", "teacher", "width", "trained with it"]
    report.section("Levels", tabulate(rows, headers=heads))


def load_student(
    model: nn.Module, weights: str, report: CheckReport, *, allow_pickle: bool = False
) -> str:
    """Load the student's start and say how many of its entries the file fills."""
    if not weights:
        report.warn("MODEL.WEIGHTS is empty: the student starts from random weights.")
        return "random weights"
    checkpointer = SafeCheckpointer(model, allow_pickle=allow_pickle)
    checkpointer.load(weights)
    keys = [k for k in model.state_dict() if not k.endswith("num_batches_tracked")]
    unfilled = checkpointer.unfilled
    text = f"{len(keys) - len(unfilled)} of {len(keys)} entries filled from {weights}"
    if len(unfilled) == len(keys):
        report.warn(f"Nothing in MODEL.WEIGHTS ({weights}) fits the student.")
    if unfilled:
        parts = sorted({key.split(".")[0] for key in unfilled})
        text += f"; random: {len(unfilled)} in {', '.join(parts)}"
    if checkpointer.unused_of_backbone:
        report.warn(f"MODEL.WEIGHTS ({weights}) {checkpointer.describe_unused('the student')}")
    return text


def _parameters(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"


def _adapters(distiller: nn.Module, level: str) -> str:
    """The losses with modules of their own for a level, such as adapters, and their size."""
    found = []
    for name, loss in distiller.losses.items():
        own = [m for path, m in loss.named_modules() if path.split(".")[-1] == level]
        count = sum(p.numel() for module in own for p in module.parameters())
        if count:
            found.append(f"{name} {count / 1e3:.1f} k")
    return ", ".join(found) or "-"
