"""A finished run as objects: its configuration, its records, its model with adapters and bank."""

import json
from pathlib import Path
from typing import List

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from ..config import add_globalkd_config
from ..data import register_datasets


def read_config(folder) -> CfgNode:
    """The configuration that a run wrote into its output folder; its datasets are registered."""
    path = Path(folder, "config.yaml")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; {folder} is not a run's output folder.")
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.merge_from_file(str(path))
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    register_datasets(cfg)
    return cfg


def read_metrics(folder) -> List[dict]:
    """The records of a run's metrics.json in their order; empty where there is none yet."""
    path = Path(folder, "metrics.json")
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def load_run(folder, checkpoint: str = "model_final.pth", *, distiller: bool = False) -> nn.Module:
    """Build a run's model with its weights, in evaluation mode.

    Args:
        folder: the run's output folder.
        checkpoint: file name in it.
        distiller: also build the distiller, with its teacher, and load its adapters and prototypes.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: `distiller` is asked for and the checkpoint has none.
    """
    cfg = read_config(folder)
    cfg.MODEL.GLOBALKD.ENABLED = distiller
    path = Path(folder, checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint.")
    model = build_model(cfg).eval()
    extra = DetectionCheckpointer(model).load(str(path))
    if distiller:
        if "distiller" not in extra:
            raise ValueError(f"{path} holds no distiller: it is a plain detector's checkpoint.")
        model.distiller.load_state_dict(extra["distiller"])
    return model
