"""The student alone, as a file that stock Detectron2 reads."""

import os

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model
from safetensors.torch import load_file, save_file
from torch import nn

from .runs import load_run, read_config

#: Distilling meta-architecture -> the stock one with the same weights.
STOCK_META_ARCHITECTURES = {
    "DistillGeneralizedRCNN": "GeneralizedRCNN",
    "DistillRetinaNet": "RetinaNet",
}


def stock_config(cfg: CfgNode) -> CfgNode:
    """The same detector as the stock meta-architecture, without the distillation keys."""
    cfg = cfg.clone()
    cfg.defrost()
    name = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = STOCK_META_ARCHITECTURES.get(name, name)
    del cfg.MODEL["GLOBALKD"]
    return cfg


def export_student(
    folder: str, output: str, *, checkpoint: str = "model_final.pth", num_images: int = 4
) -> int:
    """Write the student of a run and check that the file gives the same detections.

    Args:
        folder: the run's output folder.
        output: a path that ends in .pth or .safetensors.
        checkpoint: file name in the folder.
        num_images: test images on which the detections must be equal.

    Returns:
        The number of detections compared.

    Raises:
        ValueError: another ending.
        RuntimeError: the detections differ; `output` is not written.
    """
    ending = os.path.splitext(output)[1]
    if ending not in (".pth", ".safetensors"):
        raise ValueError(f"--output is {output!r}; it must end in .pth or .safetensors.")
    cfg = read_config(folder)
    student = load_run(folder, checkpoint)
    partial = f"{output}.partial{ending}"
    state = {name: value.cpu().contiguous() for name, value in student.state_dict().items()}
    if ending == ".pth":
        torch.save({"model": state, "__author__": "globalkd"}, partial)
    else:
        save_file(state, partial)
    try:
        stock = build_model(stock_config(cfg)).eval()
        _load(stock, partial)
        compared = _compare(student, stock, cfg, num_images)
        os.replace(partial, output)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    return compared


def _load(model: nn.Module, path: str) -> None:
    if path.endswith(".pth"):
        DetectionCheckpointer(model).load(path)
    else:
        model.load_state_dict(load_file(path), strict=True)


@torch.no_grad()
def _compare(student: nn.Module, stock: nn.Module, cfg: CfgNode, num_images: int) -> int:
    compared = 0
    loader = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])
    for _, inputs in zip(range(num_images), loader):
        ours, theirs = student(inputs)[0]["instances"], stock(inputs)[0]["instances"]
        same = len(ours) == len(theirs) and all(
            torch.equal(ours.get(field), theirs.get(field)) for field in ("scores", "pred_classes")
        )
        if not same or not torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor):
            raise RuntimeError(
                f"The exported student detects otherwise on {inputs[0]['file_name']}."
            )
        compared += len(ours)
    return compared
