"""Runs side by side: their results, what their detectors cost, and their curves.

The teacher of a distilled run has a row of its own. Parameters and floating-point operations (one
multiply-add counts as one) are counted by fvcore, operations as the mean over three images; speed
is measured on this machine, one image at a time, without reading it from disk.
Written: compare.csv, compare.png, machine.txt.
"""

import argparse
import logging
import platform
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_test_loader
from detectron2.utils.analysis import FlopCountAnalysis, parameter_count
from torch import nn
from tqdm import tqdm

from ..engine.command_line import add_opts_argument, positive
from ..meta_arch import is_distilled
from .curves import draw_curves
from .runs import final_metrics, first_test_set, load_run, load_teacher, read_config
from .tables import as_text, write_csv

logger = logging.getLogger(__name__)

WARM_UP_IMAGES = 3
#: Counting operations traces the detector, which takes long; they differ little between images.
TRACED_IMAGES = 3


class Contestant(NamedTuple):
    """A detector to compare: its name, where its results lie, its model and how it is fed."""

    name: str
    folder: Path
    model: nn.Module
    cfg: CfgNode


def compare_report(
    folders: Sequence[Path],
    *,
    output: Path,
    checkpoint: str = "model_final.pth",
    num_images: int = 20,
    opts: Sequence[str] = (),
) -> List[dict]:
    """Compare runs and write what the module names.

    Args:
        folders: output folders of runs, at least one.
        output: an existing folder.
        checkpoint: file name in each folder.
        num_images: test images on which speed is measured.
        opts: overrides of every run's configuration.

    Returns:
        One dict a detector: "run", its final metrics ("AP", ...; NaN where it was not evaluated),
        "parameters_M" (millions), "GFLOPs", "images_per_second".
    """
    rows, test_sets = [], {}
    for contestant in contestants(folders, checkpoint, opts):
        images = _test_images(contestant.cfg, num_images)
        cost = detector_cost(contestant.model, images, name=contestant.name)
        metrics = final_metrics(contestant.folder)
        rows.append({"run": contestant.name, **metrics, **cost})
        if metrics:
            test_sets[contestant.name] = first_test_set(contestant.folder)
    if len(set(test_sets.values())) > 1:
        logger.warning(f"These AP are of different test sets, and do not compare: {test_sets}.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns.sort(key=lambda key: key in cost)  # what it costs comes last
    rows = [{key: row.get(key, float("nan")) for key in columns} for row in rows]
    empty = [key for key in columns if all(row[key] != row[key] for row in rows)]  # NaN
    rows = [{key: row[key] for key in columns if key not in empty} for row in rows]
    write_csv(output / "compare.csv", rows)
    named = _names(folders)
    draw_curves(output / "compare.png", {name: [path] for path, name in named.items()})
    (output / "machine.txt").write_text(_machine(contestant.model) + "\n")
    return rows


def contestants(
    folders: Sequence[Path], checkpoint: str, opts: Sequence[str] = ()
) -> List[Contestant]:
    """The detectors of the runs, and of their teachers where those are not among the runs."""
    named = _names(folders)
    found, seen = [], {path.resolve() for path in named}
    for path, name in named.items():
        cfg = read_config(path, opts)
        if is_distilled(cfg):
            teacher_folder = Path(cfg.MODEL.GLOBALKD.TEACHER.WEIGHTS).resolve().parent
            if teacher_folder not in seen:
                seen.add(teacher_folder)
                teacher = load_teacher(path, opts)
                fed = cfg.clone()
                fed.INPUT.FORMAT = teacher.input_format
                found.append(Contestant(f"teacher of {name}", teacher_folder, teacher.model, fed))
        found.append(Contestant(name, path, load_run(path, checkpoint, opts=opts), cfg))
    return found


def detector_cost(
    model: nn.Module, images: Sequence[List[dict]], *, name: str = "cost"
) -> Dict[str, float]:
    """What a detector costs: "parameters_M", "GFLOPs" and "images_per_second".

    Args:
        model: a detector in evaluation mode.
        images: batches of one image.
        name: for the progress bar.
    """
    with torch.no_grad():
        bar = tqdm(images[:TRACED_IMAGES], desc=f"operations, {name}", unit="image", disable=None)
        flops = np.mean([_flops(model, batch) for batch in bar])
        for batch in images[:WARM_UP_IMAGES]:
            model(batch)
        seconds = np.median([_seconds(model, batch) for batch in images])
    return {
        "parameters_M": parameter_count(model)[""] / 1e6,
        "GFLOPs": float(flops) / 1e9,
        "images_per_second": float(1 / seconds),
    }


def _flops(model: nn.Module, batch: List[dict]) -> float:
    counter = FlopCountAnalysis(model, batch)
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return counter.total()


def _seconds(model: nn.Module, batch: List[dict]) -> float:
    start = time.perf_counter()
    model(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _test_images(cfg: CfgNode, count: int) -> List[List[dict]]:
    if not cfg.DATASETS.TEST:
        raise ValueError(
            f"{cfg.OUTPUT_DIR}: DATASETS.TEST names no dataset on whose images speed could be "
            "measured; give one with --opts."
        )
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])[:count]
    mapper = DatasetMapper(cfg, is_train=False)
    return list(build_detection_test_loader(records, mapper=mapper))


def _names(folders: Sequence[Path]) -> Dict[Path, str]:
    """Folder -> its last part, or all of it where two have the same."""
    last = [Path(folder).name for folder in folders]
    return {
        Path(folder): name if last.count(name) == 1 else str(folder)
        for folder, name in zip(folders, last)
    }


def _machine(model: nn.Module) -> str:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return f"Speed measured on {torch.cuda.get_device_name(device)}."
    return (
        f"Speed measured on a CPU ({platform.machine()}; threads: {torch.get_num_threads()}), "
        f"PyTorch {torch.__version__}."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--checkpoint", default="model_final.pth", help="file name in each folder")
    parser.add_argument(
        "--output", type=Path, help="folder to write; default: compare, beside the first run"
    )
    parser.add_argument("--num-images", type=positive, default=20, help="to measure the speed on")
    add_opts_argument(parser)


def main(args: argparse.Namespace) -> None:
    output = args.output or args.runs[0].resolve().parent / "compare"
    output.mkdir(parents=True, exist_ok=True)
    rows = compare_report(
        args.runs,
        output=output,
        checkpoint=args.checkpoint,
        num_images=args.num_images,
        opts=args.opts,
    )
    print(f"{as_text(rows)}\n{(output / 'machine.txt').read_text()}")
