"""A stock detector as a graph without Detectron2: TorchScript by tracing, or ONNX.

Both graphs take one image as the test loader gives it, (3, H, W) uint8 of any size in the channel
order that the detector was trained with, resized already. They return the boxes in pixels of that
image, the scores and the classes. A mask or keypoint head is left out.

ONNX is written by PyTorch's exporter for traced graphs (`dynamo=False`): `torch.export`, on which
the newer one rests, stops at the data-dependent sizes in Detectron2's detectors.
"""

import io
import json
import warnings
from importlib.util import find_spec
from typing import Callable, NamedTuple

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from torch import Tensor, nn

from ..engine.disk import writing

#: From this version on ONNX's RoiAlign knows Detectron2's half-pixel shift (ROIAlignV2).
OPSET = 16
ABOUT = "globalkd.json"


class Detections(NamedTuple):
    """What a graph returns, with these names: (R, 4) XYXY_ABS, (R,) and (R,) int64."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor


@torch.no_grad()
def detect(model: nn.Module, image: Tensor) -> Detections:
    """Detections on one (3, H, W) image, in its own pixels."""
    inputs = [{"image": image}]
    if isinstance(model, GeneralizedRCNN):
        (found,) = model.inference(inputs, do_postprocess=False)
    else:
        found = model(inputs)[0]["instances"]
    return Detections(found.pred_boxes.tensor, found.scores, found.pred_classes)


def write_torchscript(
    model: nn.Module, image: Tensor, path: str, about: dict
) -> Callable[[Tensor], Detections]:
    """Trace a detector on an image and save the graph.

    Args:
        model: a `GeneralizedRCNN` or `RetinaNet` in evaluation mode.
        image: (3, H, W) uint8.
        path: the file to write.
        about: JSON values, kept in the file as "globalkd.json".

    Returns:
        The graph as it was read back, as a function like `detect`.

    Raises:
        OSError: it could not be written.
        RuntimeError: the detector cannot be traced.
    """
    adapter = _adapter(model, image)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, about shapes that Detectron2 handles
        try:
            graph = torch.jit.trace(adapter, (image,), check_trace=False)
        except Exception as error:
            raise RuntimeError(f"This detector cannot be traced: {error}") from error
        with writing(path), open(path, "wb") as file:
            torch.jit.save(graph, file, _extra_files={ABOUT: json.dumps(about)})
        loaded = torch.jit.load(path)
    return lambda x: Detections(*loaded(x))


def write_onnx(
    model: nn.Module, image: Tensor, path: str, about: dict
) -> Callable[[Tensor], Detections]:
    """Write a detector as ONNX; arguments and result as in `write_torchscript`.

    `about` becomes the model's metadata, values as JSON. The result runs in ONNX Runtime.

    Raises:
        ImportError: the packages `onnx` and `onnxruntime` are missing.
        RuntimeError: the detector cannot be exported.
    """
    require_onnx()
    import onnx
    import onnxruntime

    content = io.BytesIO()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above, and that the other exporter is preferred
            torch.onnx.export(
                _adapter(model, image),
                (image,),
                content,
                dynamo=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=list(Detections._fields),
                dynamic_axes={
                    "image": {1: "height", 2: "width"},
                    **{name: {0: "detections"} for name in Detections._fields},
                },
            )
    except Exception as error:
        raise RuntimeError(
            f"This detector cannot be exported to ONNX: {error}. TorchScript (.ts) knows more "
            "operators."
        ) from error
    graph = onnx.load_model_from_string(content.getvalue())
    onnx.helper.set_model_props(graph, {key: json.dumps(value) for key, value in about.items()})
    onnx.checker.check_model(graph)
    with writing(path), open(path, "wb") as file:
        onnx.save(graph, file)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: Detections(
        *map(torch.from_numpy, session.run(list(Detections._fields), {"image": x.numpy()}))
    )


#: File ending -> how such a graph is written.
WRITERS = {".ts": write_torchscript, ".onnx": write_onnx}


def require_onnx() -> None:
    """Raise ImportError, saying what to install, where ONNX cannot be written and run."""
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Export to .onnx needs {' and '.join(missing)}: pip install -e '.[export]' in a "
            "checkout of this project, or pip install onnx onnxruntime."
        )


def _adapter(model: nn.Module, image: Tensor) -> TracingAdapter:
    """The detector with tensors in and tensors out."""
    if not isinstance(model, (GeneralizedRCNN, RetinaNet)):
        raise RuntimeError(
            f"A graph is made of a GeneralizedRCNN or a RetinaNet, not of {type(model).__name__}."
        )
    # In evaluation mode itself: the ONNX exporter gives its own mode back to all below it.
    return TracingAdapter(model, image, detect).eval()
