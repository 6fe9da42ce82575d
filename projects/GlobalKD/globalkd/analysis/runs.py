"""A finished run as objects: its configuration, its records, its model with adapters and bank."""

import argparse
import json
import logging
from pathlib import Path
from typing import Dict, List, Sequence

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..config_reading import fall_back_to_cpu, load_config
from ..data import register_datasets
from ..engine.command_line import add_opts_argument
from ..meta_arch import require_distilled
from ..safe_loading import SafeCheckpointer
from ..teacher import Teacher
from ..teacher.building import teacher_from_config

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AP-clean", "AP-ambiguous")


def add_run_arguments(parser: argparse.ArgumentParser, part: str, *, dataset: bool = True) -> None:
    """The arguments of every part of tools/analyze.py that looks at one distilled run."""
    parser.add_argument("run", help="output folder of a distilled run")
    parser.add_argument("--checkpoint", default="model_final.pth", help="file name in the folder")
    if dataset:
        parser.add_argument("--dataset", default="", help="default: the first of DATASETS.TEST")
    parser.add_argument("--output", default="", help=f"folder to write; default: RUN/{part}")
    add_opts_argument(parser)
    parser.set_defaults(part=part)


def output_folder(args: argparse.Namespace) -> Path:
    """The folder that `add_run_arguments` asked for, made."""
    folder = Path(args.output or Path(args.run, args.part))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_config(folder, opts: Sequence[str] = ()) -> CfgNode:
    """The configuration of a run for this machine: on its device, with the datasets registered.

    Args:
        folder: the run's output folder.
        opts: overrides, `["KEY", "VALUE", ...]`: where data or teacher lie elsewhere now.
    """
    cfg = written_config(folder, opts)
    fall_back_to_cpu(cfg)
    register_datasets(cfg)
    return cfg


def written_config(folder, opts: Sequence[str] = ()) -> CfgNode:
    """The configuration that a run wrote into its output folder; arguments as in `read_config`."""
    path = Path(folder, "config.yaml")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; {folder} is not a run's output folder.")
    return load_config(str(path), opts)


def read_metrics(folder) -> List[dict]:
    """The records of a run's metrics.json in their order; empty where there is none yet.

    With several test sets, the first one's metrics get the names that a single set's would have
    ("bbox/AP"); those of the others keep theirs ("other_set/bbox/AP").
    """
    path = Path(folder, "metrics.json")
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    if not any(key.endswith("/bbox/AP") for record in records for key in record):
        return records
    prefix = f"{first_test_set(folder)}/"
    return [{key.removeprefix(prefix): value for key, value in r.items()} for r in records]


def first_test_set(folder) -> str:
    """The dataset that a run's results are of; empty where its configuration is not there."""
    try:
        return next(iter(written_config(folder).DATASETS.TEST), "")
    except (OSError, ValueError):
        return ""


def final_metrics(folder) -> Dict[str, float]:
    """A run's last box metrics ("AP", "AP50", ...) but for those of single classes; maybe empty."""
    records = [record for record in read_metrics(folder) if "bbox/AP" in record]
    last = records[-1] if records else {}
    names = {name: f"bbox/{name}" for name in METRICS}
    return {name: last[key] for name, key in names.items() if key in last}


def load_run(
    folder,
    checkpoint: str = "model_final.pth",
    *,
    distiller: bool = False,
    opts: Sequence[str] = (),
) -> nn.Module:
    """Build a run's model with its weights, in evaluation mode.

    Datasets are registered, and must be there, only with the distiller.

    Args:
        folder: the run's output folder.
        checkpoint: file name in it.
        distiller: also build the distiller, with its teacher, and load its adapters and prototypes.
        opts: overrides of the run's configuration.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: the checkpoint does not fill the detector, or has no distiller where one is
            asked for.
    """
    cfg = written_config(folder, opts)
    fall_back_to_cpu(cfg)
    if distiller:
        register_datasets(cfg)
    cfg.MODEL.GLOBALKD.ENABLED = distiller
    path = Path(folder, checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint.")
    warn_if_not_last(path)
    model = build_model(cfg).eval()
    extra = load_whole(model, str(path), allow_pickle=cfg.MODEL.GLOBALKD.ALLOW_PICKLE)
    if distiller:
        if "distiller" not in extra:
            raise ValueError(f"{path} holds no distiller: it is a plain detector's checkpoint.")
        model.distiller.load_state_dict(extra["distiller"])
    return model


def load_whole(model: nn.Module, weights: str, *, allow_pickle: bool = False) -> dict:
    """Load a checkpoint and refuse it unless it fills every entry of the detector.

    One with entries of a backbone that the detector has no place for is refused, too.

    Returns:
        What else is in it.

    Raises:
        ValueError: entries stayed as they were, or were left over; the message names them.
    """
    checkpointer = SafeCheckpointer(model, allow_pickle=allow_pickle)
    extra = checkpointer.load(weights)
    needed = "The configuration and its overrides must be what the weights were trained with."
    if checkpointer.unfilled:
        raise ValueError(f"{weights} {checkpointer.describe_unfilled('the detector')}. {needed}")
    if checkpointer.unused_of_backbone:
        raise ValueError(f"{weights} {checkpointer.describe_unused('the detector')} {needed}")
    return extra


def warn_if_not_last(checkpoint: Path) -> None:
    """Say so where a run has gone on since it wrote a checkpoint, and was then interrupted."""
    tag = checkpoint.parent / "last_checkpoint"
    last = tag.read_text().strip() if tag.is_file() else ""
    if checkpoint.name == "model_final.pth" and last not in ("", checkpoint.name):
        logger.warning(
            f"{checkpoint} is older than the run's last checkpoint, {last}: the run was resumed "
            "and has not ended."
        )


def load_teacher(folder, opts: Sequence[str] = ()) -> Teacher:
    """The teacher that a run was distilled from, as Detectron2 builds it.

    Raises:
        ValueError: the run is not a distilled one.
    """
    cfg = read_config(folder, opts)
    require_distilled(cfg, str(folder))
    return teacher_from_config(cfg, stock=True)
