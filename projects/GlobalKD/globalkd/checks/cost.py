"""What one step of a configuration does, what it costs, and what the whole run will cost."""

import math
import time
from datetime import datetime, timedelta

from detectron2.config import CfgNode
from tabulate import tabulate
from torch import nn

from ..engine.trainer import DistillTrainer
from . import step as measured
from .report import CheckReport
from .terms import StepTerms, measure_terms

#: A term is remarkable above so many times the detection loss, and below so little of its gradient.
LARGE, SMALL = 1000.0, 1e-3
INFERENCE_IMAGES = 8


def check_cost(
    trainer: DistillTrainer,
    cfg: CfgNode,
    report: CheckReport,
    steps: int,
    prototype_images: int,
    num_gpus: int,
) -> None:
    """Prototypes, one step, time, memory, and the forecast of the run."""
    report.echo("\nMeasuring ...")
    refresh = period = 0.0
    distiller = trainer.distiller
    if distiller is not None and distiller.bank is not None:
        with report.part("Prototypes"):
            refresh, period = _check_prototypes(trainer, report, prototype_images, num_gpus)
        if not distiller.bank.is_ready:
            return
    with report.part("One step"):
        # On a GPU, TEACHER.CUDA_GRAPHS records, which takes memory, at the second batch of a shape.
        for _ in range(3 if measured.on_gpu(cfg.MODEL.DEVICE) else 1):
            measured.run_step(trainer)
        memory = measured.peak_memory(cfg.MODEL.DEVICE)
        if distiller is not None:
            batch = next(iter(trainer.data_loader))
            _report_terms(measure_terms(trainer.model, batch), distiller.losses, cfg, report)
        trainers = {"as configured": trainer}
        if distiller is not None:
            trainers["plain student"] = DistillTrainer(_plain(cfg))
        seconds = measured.time_steps(trainers, steps)
        image = measured.time_inference(trainer.model, cfg, INFERENCE_IMAGES)
        cost = measured.forecast(
            cfg,
            step=seconds["as configured"],
            refresh=refresh,
            period=period,
            image=image,
            num_gpus=num_gpus,
        )
        _report_cost(seconds, memory, cost, cfg, report)


def _plain(cfg: CfgNode) -> CfgNode:
    plain = cfg.clone()
    plain.MODEL.GLOBALKD.ENABLED = False
    return plain


def _check_prototypes(trainer, report: CheckReport, num_images: int, num_gpus: int):
    """Make trial prototypes; seconds of a whole refresh and iterations between two of them."""
    distiller, refresher = trainer.distiller, trainer.distiller.refresher
    total = len(refresher.records)
    used = math.ceil(total / math.ceil(total / num_images))
    start = time.perf_counter()
    with report.trial():
        distiller.start(trainer.model)
        prototypes = distiller.refresh(trainer.model, num_images)
    seconds = (time.perf_counter() - start) * total / used
    covered = int((prototypes.counts > 0).sum())
    if refresher.file:
        with report.part("MODEL.GLOBALKD.PROTOTYPES.FILE"):
            refresher.load(distiller.bank)
    period = refresher.period / num_gpus
    often = f"every {period:.0f} iterations" if period else "only once, before the first step"
    if 0 < period < 1:
        often = "before every step"
        report.warn(
            f"MODEL.GLOBALKD.PROTOTYPES.REFRESH_EPOCHS ({refresher.refresh_epochs:g}) ends within "
            f"a step: an epoch is {period / refresher.refresh_epochs:.2g} steps long. Prototypes "
            "are made before every step; a larger value makes them less often."
        )
    if distiller.reservoir is not None:  # later ones take what the steps computed
        period = 0.0
        often += ", after the first time from the training steps"
    report.section(
        "Prototypes",
        f"{refresher.generation.generator}, {distiller.bank.num_prototypes} a class and level, "
        f"from {total} images, made {often}",
        f"a trial on {used} of these images: {int(prototypes.counts.sum())} instances of "
        f"{covered} of {len(prototypes.counts)} classes",
    )
    return seconds, period


def _report_terms(
    step: StepTerms, losses: nn.ModuleDict, cfg: CfgNode, report: CheckReport
) -> None:
    shares = {name: step.share([name]) for name in step.values}
    rows = [("detection losses", f"{step.detection:.4g}", "1", "1")]
    rows += [
        (name, f"{step.values[name]:.4g}", f"{ratio:.3g}", f"{gradient:.3g}")
        for name, (ratio, gradient) in shares.items()
    ]
    heads = ["term", "value", "ratio", "gradient ratio"]
    report.section(f"One step, {step.instances} boxes", tabulate(rows, headers=heads))
    for loss in losses.values():
        teaches = any(shares[name][1] > 0 for name in loss.weights)
        for name in loss.weights:
            _judge_term(name, step.values[name], *shares[name], report=report, teaches=teaches)
    if step.unread:
        key = "MODEL.GLOBALKD.IN_FEATURES" if cfg.MODEL.GLOBALKD.IN_FEATURES else "Matched levels"
        report.warn(f"{key}: no loss reads {step.unread}.")


def _judge_term(
    name: str, value: float, ratio: float, gradient: float, *, report: CheckReport, teaches: bool
) -> None:
    """Say what is wrong with a term; `teaches`: whether any of its loss's terms does."""
    if not math.isfinite(value) or not math.isfinite(gradient):
        report.problem(f"{name} is {value}, its gradient {gradient}, in the first step.")
    elif value == 0:
        report.warn(f"{name} is 0 in the first step.")
    elif max(ratio, gradient) >= LARGE:
        report.warn(
            f"{name} is {ratio:.3g} times the detection losses, its gradient on the backbone "
            f"{gradient:.3g} times theirs: a smaller weight may be wanted."
        )
    elif gradient == 0 and teaches:
        pass  # it trains the loss's own modules, such as a decoder
    elif gradient <= SMALL:
        report.warn(
            f"{name}: its gradient on the backbone is {gradient:.1g} of the detection losses': it "
            "hardly teaches."
        )


def _report_cost(
    seconds: dict, memory: float, cost: measured.Forecast, cfg: CfgNode, report: CheckReport
) -> None:
    step, plain = seconds["as configured"], seconds.get("plain student")
    lines = [f"a step: {step:.3f} s"]
    if plain is not None:
        lines[0] += f"; of the plain student: {plain:.3f} s (x {step / plain:.2f})"
    where = "on the GPU" if measured.on_gpu(cfg.MODEL.DEVICE) else "of the process"
    lines.append(f"memory in the first steps: {memory:.2f} GiB {where}, at most")
    parts = [
        ("steps", cfg.SOLVER.MAX_ITER, cost.steps),
        ("prototype refreshes", cost.num_refreshes, cost.refreshes),
        ("evaluations", cost.num_evaluations, cost.evaluations),
        ("the whole run", "", cost.total),
    ]
    rows = [(name, count, _duration(duration)) for name, count, duration in parts]
    end = datetime.now() + timedelta(seconds=cost.total)
    report.section(
        "Cost",
        *lines,
        tabulate(rows, headers=["forecast", "times", "duration"]),
        f"started now, it would end on {end:%Y-%m-%d %H:%M}",
    )


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
