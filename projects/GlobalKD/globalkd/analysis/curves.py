"""Curves over the training steps of runs, drawn from their metrics.json."""

from pathlib import Path
from typing import Dict, Sequence

from matplotlib.figure import Figure

from .runs import read_metrics

COLOURS = {"teacher": "#7f7f7f", "plain": "#1f77b4", "distilled": "#d62728"}


def draw_curves(path, folders: Dict[str, Sequence[Path]]) -> None:
    """AP over the training steps of each run, and the detection loss.

    Args:
        path: the file.
        folders: legend -> output folders drawn in one colour, such as the seeds of one setting.
    """
    figure = Figure(figsize=(10, 3.6), layout="tight")
    left, right = figure.subplots(1, 2)
    for number, (name, runs) in enumerate(folders.items()):
        colour = COLOURS.get(name, f"C{number}")
        for i, folder in enumerate(runs):
            style = {"color": colour, "label": name if i == 0 else None, "alpha": 0.8}
            records = read_metrics(folder)
            _plot(left, records, lambda r: r.get("bbox/AP"), marker="o", **style)
            _plot(right, records, _detection_loss, **style)
    left.set(xlabel="step", ylabel="AP", title="AP on DATASETS.TEST")
    right.set(xlabel="step", ylabel="loss", title="Detection loss (without distillation terms)")
    _finish(path, figure)


def draw_distillation(path, folder) -> None:
    """A distilled run's weighted terms, and the mean reliability of its instances, over the steps.

    Args:
        path: the file.
        folder: the run's output folder.
    """
    records = read_metrics(folder)
    figure = Figure(figsize=(10, 3.6), layout="tight")
    left, right = figure.subplots(1, 2)
    for name in sorted({key for r in records for key in r if key.startswith("loss_kd_")}):
        _plot(left, records, lambda r, name=name: r.get(name), label=name)
    _plot(right, records, lambda r: r.get("kd/reliability"), label="mean over levels")
    left.set(xlabel="step", ylabel="loss", title="Distillation terms, weighted")
    right.set(xlabel="step", ylabel="reliability", title="Reliability of the instances")
    _finish(path, figure)


def _finish(path, figure: Figure) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=110)


def _plot(axis, records, value, **style) -> None:
    # The evaluation after training is recorded one step later than the last losses.
    last = max((r["iteration"] for r in records), default=0)
    points = [(min(r["iteration"] + 1, last), value(r)) for r in records if value(r) is not None]
    if len(points) == 1:  # a line of one point is none
        style.setdefault("marker", "o")
    if points:
        axis.plot(*zip(*points), **style)


def _detection_loss(record):
    terms = [v for k, v in record.items() if k.startswith("loss_") and "_kd_" not in k]
    return sum(terms) if terms else None
