"""The student of a run as a file of its own: weights for Detectron2, or a graph without it.

Here: which formats there are, and the proof that the file detects as the run does. Not here: how a
detector becomes a graph (`graph_export`).
"""

import os
from dataclasses import dataclass
from typing import Callable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.modeling import build_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..safe_loading import SafeCheckpointer
from . import graph_export
from .graph_export import Detections
from .runs import load_run, read_config

#: Distilling meta-architecture -> the stock one with the same weights.
STOCK_META_ARCHITECTURES = {
    "DistillGeneralizedRCNN": "GeneralizedRCNN",
    "DistillRetinaNet": "RetinaNet",
}
WEIGHTS, GRAPHS = (".pth", ".safetensors"), (".ts", ".onnx")
#: What rounding may change in a graph: pixels of a box's side, and score.
BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3


@dataclass
class Agreement:
    """How an exported student's detections compare with the run's.

    Attributes:
        images: inputs compared.
        detections: the run's detections on them.
        box: largest difference of a coordinate, in pixels of the network's input.
        score: largest difference of a score.
    """

    images: int = 0
    detections: int = 0
    box: float = 0.0
    score: float = 0.0


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
) -> Agreement:
    """Write the student of a run and check that the file gives the same detections.

    Weights must give exactly the run's detections; a graph (TorchScript, ONNX) the same up to
    rounding, on the CPU, and also on a smaller image and on one without a detection.

    Args:
        folder: the run's output folder.
        output: a path that ends in .pth, .safetensors, .ts or .onnx.
        checkpoint: file name in the folder.
        num_images: test images on which the detections are compared.

    Raises:
        ImportError: .onnx without the packages `onnx` and `onnxruntime`.
        RuntimeError: the detections differ, or the detector cannot become a graph; `output` is not
            written.
        ValueError: another ending.
    """
    ending = os.path.splitext(output)[1]
    if ending not in WEIGHTS + GRAPHS:
        raise ValueError(f"--output is {output!r}; it must end in {', '.join(WEIGHTS + GRAPHS)}.")
    if ending == ".onnx":
        graph_export.require_onnx()
    opts = ["MODEL.DEVICE", "cpu"] if ending in GRAPHS else []  # a graph keeps its device
    cfg = read_config(folder, opts)
    student = load_run(folder, checkpoint, opts=opts)
    images = _test_images(cfg, num_images)
    partial = f"{output}.partial{ending}"
    try:
        if ending in WEIGHTS:
            detect = _write_weights(student, cfg, partial)
            tolerances = (0.0, 0.0)
        else:
            image = next(images)
            write = graph_export.WRITERS[ending]
            detect = write(student, image, partial, _description(cfg))
            images = _with_hard_cases(image, images)
            tolerances = (BOX_TOLERANCE, SCORE_TOLERANCE)
        agreement = compare(lambda x: graph_export.detect(student, x), detect, images, *tolerances)
        os.replace(partial, output)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    return agreement


def _test_images(cfg: CfgNode, count: int) -> Iterator[Tensor]:
    loader = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])
    return (inputs[0]["image"] for _, inputs in zip(range(count), loader))


def _with_hard_cases(first: Tensor, others: Iterator[Tensor]) -> Iterator[Tensor]:
    """What a traced graph may have frozen: the values, the size and the number of detections."""
    yield first
    yield from others
    yield first[:, : first.shape[1] * 3 // 4, : first.shape[2] * 5 // 8]
    yield torch.zeros_like(first)


def _write_weights(student: nn.Module, cfg: CfgNode, path: str) -> Callable[[Tensor], Detections]:
    state = {name: value.cpu().contiguous() for name, value in student.state_dict().items()}
    stock = build_model(stock_config(cfg)).eval()
    if path.endswith(".pth"):
        torch.save({"model": state, "__author__": "globalkd"}, path)
        SafeCheckpointer(stock).load(path)
    else:
        save_file(state, path)
        stock.load_state_dict(load_file(path), strict=True)
    return lambda image: graph_export.detect(stock, image)


def _description(cfg: CfgNode) -> dict:
    """What a user of the graph must know to feed it and to read it."""
    return {
        "classes": list(MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("thing_classes", [])),
        "channels": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
    }


def compare(
    ours: Callable[[Tensor], Detections],
    theirs: Callable[[Tensor], Detections],
    images: Iterator[Tensor],
    box_tolerance: float,
    score_tolerance: float,
) -> Agreement:
    """Compare two detectors on images, whatever order equal scores came in.

    Every detection must have a partner of its class within the tolerances in the other's. Where a
    score lies within its tolerance of the lowest that was kept, rounding decides whether the
    detection is kept at all: such a one may have none.

    Raises:
        RuntimeError: a detection has no partner.
    """
    agreement = Agreement()
    for index, image in enumerate(images):
        a, b = ours(image), theirs(image)
        box = (a.boxes[:, None] - b.boxes[None]).abs().amax(dim=2)
        score = (a.scores[:, None] - b.scores[None]).abs()
        fits = (box <= box_tolerance) & (score <= score_tolerance)
        fits &= a.classes[:, None] == b.classes[None]
        lowest = min([x.scores.min() for x in (a, b) if len(x.scores)], default=0.0)
        surely_kept = [x.scores - score_tolerance >= lowest for x in (a, b)]
        if (surely_kept[0] & ~fits.any(dim=1)).any() or (surely_kept[1] & ~fits.any(dim=0)).any():
            raise RuntimeError(
                f"The exported student detects otherwise on image {index}, {tuple(image.shape)}: "
                f"{len(b.scores)} detections, the run {len(a.scores)}; not equal within "
                f"{box_tolerance:g} pixels and {score_tolerance:g} of score."
            )
        agreement.images += 1
        agreement.detections += len(a.scores)
        if fits.any():
            nearest = box.masked_fill(~fits, torch.inf).min(dim=1)
            found = nearest.values.isfinite()
            agreement.box = max(agreement.box, nearest.values[found].max().item())
            rows = torch.arange(len(found))[found.cpu()]
            matched = score[rows, nearest.indices[found]]
            agreement.score = max(agreement.score, matched.max().item())
    return agreement
