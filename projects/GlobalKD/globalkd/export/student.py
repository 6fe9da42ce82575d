"""The student of a run as a file of its own: weights for Detectron2, or a graph without it.

Here: which formats there are, and the stock configuration beside weights. Not here: how a detector
becomes a graph (`graphs`), and the proof that it detects as the run does (`comparison`).
"""

import inspect
import json
import logging
import os
from typing import Callable, Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..analysis.runs import load_run, written_config
from ..config import add_globalkd_config
from ..data.class_names import class_names
from ..engine.disk import writing
from ..meta_arch import DistillMixin
from ..safe_loading import SafeCheckpointer
from . import graphs
from .comparison import Agreement, compare, comparison_images, none_if_not_here, with_hard_cases
from .graphs import Detections

logger = logging.getLogger(__name__)

WEIGHTS, GRAPHS = (".pth", ".safetensors"), (".ts", ".onnx")
#: What rounding may change in a graph: pixels of a box's side, and score.
BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3


def stock_config(cfg: CfgNode) -> CfgNode:
    """The same detector as the stock meta-architecture, without a key of this project's."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = stock_architecture(cfg.MODEL.META_ARCHITECTURE)
    stock = get_cfg()
    ours = stock.clone()
    add_globalkd_config(ours)
    _drop_added(cfg, ours, stock)
    return cfg


def stock_architecture(name: str) -> str:
    """The meta-architecture with the same weights and without a distiller.

    Args:
        name: MODEL.META_ARCHITECTURE; one that does not distil is returned as it is. Of one of the
            user's own, it is the first class that it inherits from and that is registered.

    Raises:
        ValueError: there is none of this name.
    """
    registered = {architecture: key for key, architecture in META_ARCH_REGISTRY}
    if name not in registered.values():
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {name!r}, which is not registered: --import the module "
            "that does."
        )
    bases = inspect.getmro(META_ARCH_REGISTRY.get(name))
    plain = (x for x in bases if x in registered and not issubclass(x, DistillMixin))
    return next((registered[x] for x in plain), name)


def _drop_added(cfg: CfgNode, ours: CfgNode, stock: CfgNode) -> None:
    for key, value in ours.items():
        if key not in stock:
            cfg.pop(key, None)
        elif isinstance(value, CfgNode):
            _drop_added(cfg[key], value, stock[key])


def export_student(
    folder: str,
    output: str,
    *,
    checkpoint: str = "model_final.pth",
    num_images: int = 4,
    opts: Sequence[str] = (),
) -> Agreement:
    """Write the student of a run and check that the file gives the same detections.

    Weights must give exactly the run's detections, and are read back equal to the bit; where the
    test images are not there, this alone is checked, with a warning. Beside them lies
    NAME_config.yaml for stock Detectron2. A graph (TorchScript, ONNX) must give the same detections
    up to rounding, on the CPU, and also on a smaller image and on one without a detection; it needs
    a test image to be made at all.

    Args:
        folder: the run's output folder.
        output: a path that ends in .pth, .safetensors, .ts or .onnx.
        checkpoint: file name in the folder.
        num_images: test images on which the detections are compared.
        opts: overrides of the run's configuration, such as where its data lie now.

    Raises:
        FileNotFoundError: no such run or checkpoint, or no test image for a graph.
        ImportError: .onnx without the packages `onnx` and `onnxruntime`.
        OSError: it could not be written.
        RuntimeError: the detections differ, or the detector cannot become a graph; `output` is not
            written.
        ValueError: another ending.
    """
    name, ending = os.path.splitext(output)
    if ending not in WEIGHTS + GRAPHS:
        raise ValueError(f"--output is {output!r}; it must end in {', '.join(WEIGHTS + GRAPHS)}.")
    if ending in GRAPHS and num_images < 1:
        raise ValueError(f"--images is {num_images}, but a graph is made on an image: 1 or more.")
    if ending == ".onnx":
        graphs.require_onnx()
    if ending in GRAPHS:
        opts = [*opts, "MODEL.DEVICE", "cpu"]  # a graph keeps its device
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    cfg = written_config(folder, opts)
    stock_architecture(cfg.MODEL.META_ARCHITECTURE)  # raises before anything is built
    student = load_run(folder, checkpoint, opts=opts)
    images = comparison_images(cfg, num_images)
    partial = f"{output}.partial{ending}"
    try:
        if ending in WEIGHTS:
            images = none_if_not_here(images)
            detect = _write_weights(student, cfg, partial)
            tolerances = (0.0, 0.0)
        else:
            image = next(images)
            write = graphs.WRITERS[ending]
            detect = write(student, image, partial, _description(cfg))
            images = with_hard_cases(image, images)
            tolerances = (BOX_TOLERANCE, SCORE_TOLERANCE)
        agreement = compare(lambda x: graphs.detect(student, x), detect, images, *tolerances)
        os.replace(partial, output)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    if ending in WEIGHTS:
        _write_stock_config(cfg, f"{name}_config.yaml", output if ending == ".pth" else "")
    if agreement.detections == 0:
        logger.warning(
            f"{output}: nothing was compared: no detection on {agreement.images} test images."
        )
    return agreement


def _write_weights(student: nn.Module, cfg: CfgNode, path: str) -> Callable[[Tensor], Detections]:
    state = {name: value.cpu().contiguous() for name, value in student.state_dict().items()}
    cfg = stock_config(cfg)
    cfg.MODEL.DEVICE = str(next(student.parameters()).device)
    stock = build_model(cfg).eval()
    if path.endswith(".pth"):
        with writing(path), open(path, "wb") as file:
            torch.save({"model": state, "__author__": "globalkd"}, file)
        SafeCheckpointer(stock).load(path)
    else:
        with writing(path), open(path, "wb") as file:
            file.write(save(state))
        stock.load_state_dict(load_file(path), strict=True)
    read = stock.state_dict()
    unequal = set(read) ^ set(state)
    unequal |= {k for k in set(read) & set(state) if not torch.equal(read[k].cpu(), state[k])}
    if unequal:
        raise RuntimeError(f"Weights are not read back as they were: {sorted(unequal)[:8]}.")
    return lambda image: graphs.detect(stock, image)


def _write_stock_config(cfg: CfgNode, path: str, weights: str) -> None:
    """What stock Detectron2 builds the student from, on the device that the run names."""
    names = class_names(cfg, cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else []
    cfg = stock_config(cfg)
    cfg.MODEL.WEIGHTS = weights
    with writing(path), open(path, "w", encoding="utf-8") as file:
        if names:
            file.write(f"# The classes by their labels: {json.dumps(names, ensure_ascii=False)}\n")
        file.write(cfg.dump())


def _description(cfg: CfgNode) -> dict:
    """What a user of the graph must know to feed it and to read it."""
    return {
        "classes": list(MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("thing_classes", [])),
        "channels": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
    }
