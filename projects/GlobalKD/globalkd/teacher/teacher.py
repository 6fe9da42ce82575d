"""The teacher: any Detectron2 detector, frozen, and hidden from the student's module tree.

Here: its features and its class predictions for boxes and anchors that the student chose. Not here:
how it is built and loaded (`teacher/building.py`), what is learned from it (`losses/`).
"""

from contextlib import nullcontext
from functools import partial
from typing import Callable, Collection, Dict, List, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..dense_head import DenseOutputs, find_dense_head, finish_tower, tower_layers
from ..features import record_calls
from ..requirement import require
from .anchor_logits import has_local_classes, single_logits, window_logits
from .backbone_pass import BackbonePass, is_safe_in_bf16
from .box_head import box_head_logits
from .classes import select_classes
from .cutting import cut_backbone
from .side_stream import SideStream

#: MODEL.GLOBALKD.TEACHER.PRECISION; None leaves the teacher in what surrounds it.
PRECISIONS = {
    "student": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class Teacher:
    """A frozen detector in evaluation mode.

    A plain object, not a module: as an attribute of the student it adds nothing to parameters,
    `state_dict()`, DDP or the optimizer. Its owner forwards `_apply` to `apply_` so that `.to()`
    and `.cuda()` reach it. After its first pass its weights are not to be changed in another way:
    a copy of them in a lower precision would stay as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_format: str,
        class_names: Sequence[str] = (),
        classes: Sequence[Union[int, str]] = (),
        precision: str = "student",
        compile: bool = False,
        input_scale: float = 1.0,
        side_stream: bool = False,
        cuda_graphs: bool = False,
    ):
        """
        Args:
            model: a detector with a `backbone` and `preprocess_image`.
            input_format: channel order that it was trained with, such as "BGR".
            class_names: names of its classes in order; empty where they are not known.
            classes: labels or names of those that the student has, in the student's order; empty
                for all. `model` is cut down to them; see `select_classes`.
            precision: a key of `PRECISIONS`. With one of its own the teacher runs under its own
                autocast, and what it returns is float32.
            compile: run the backbone through `torch.compile`.
            input_scale: factor on the sides of the images that the backbone sees.
            side_stream: on a GPU, `begin` runs the backbone on a stream of its own.
            cuda_graphs: on a GPU, the backbone's kernels are recorded for each shape of its input
                and replayed.

        Raises:
            ValueError: a setting that is not among these, or classes that it has not.
        """
        if not (hasattr(model, "preprocess_image") and hasattr(model, "backbone")):
            raise ValueError(
                f"MODEL.GLOBALKD.TEACHER.CONFIG_FILE is of a {type(model).__name__}, which has no "
                "backbone and preprocess_image: a teacher must be a detector."
            )
        require("TEACHER.PRECISION", precision, precision in PRECISIONS, list(PRECISIONS))
        require("TEACHER.INPUT_SCALE", input_scale, 0 < input_scale < float("inf"), "positive")
        self.model = model.eval().requires_grad_(False)
        self.input_format = input_format
        self.class_names = select_classes(model, classes, class_names)
        self.precision = precision
        self.input_scale = input_scale
        self._modes = {"compile": compile, "cuda_graphs": cuda_graphs}
        self._wants_side_stream = side_stream
        self._side_stream: Optional[SideStream] = None
        self.read_levels(list(model.backbone.output_shape()))

    def __getstate__(self):
        return {**self.__dict__, "_side_stream": None}  # a copy makes its own

    @property
    def output_shape(self):
        """Level name -> Detectron2's ShapeSpec (channels, stride), of all levels."""
        return self.model.backbone.output_shape()

    @property
    def num_classes(self) -> int:
        """K; a ValueError where its heads score no classes."""
        heads = getattr(self.model, "roi_heads", self.model)
        if not hasattr(heads, "num_classes"):
            raise ValueError(
                f"MODEL.GLOBALKD.TEACHER.CONFIG_FILE is of a {type(self.model).__name__}, which "
                "scores no classes of objects: losses that compare them need another teacher."
            )
        return heads.num_classes

    def apply_(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a tensor function (a move of device or dtype) to all parameters and buffers."""
        self.model._apply(fn)
        self._backbone.forget()

    def read_levels(self, levels: Collection[str]) -> None:
        """From now on `features` gives these levels alone and leaves out what they do not need.

        Raises:
            ValueError: a level that the backbone has not.
        """
        if unknown := sorted(set(levels) - set(self.output_shape)):
            raise ValueError(
                f"The teacher has no level {unknown}; it has {list(self.output_shape)}."
            )
        self._levels = tuple(levels)
        self._backbone = BackbonePass(cut_backbone(self.model.backbone, levels), **self._modes)

    def begin(self, batched_inputs: List[dict], input_format: str) -> Callable[[], Dict]:
        """Begin `features` as early as it can run.

        Returns:
            A function that gives what `features` does. With a side stream or CUDA graphs on a GPU
            the pass has been launched by then; otherwise it runs when the function is called. Call
            it once.
        """
        run = partial(self.features, batched_inputs, input_format)
        device = self.model.device
        if device.type != "cuda":
            return run
        if self._wants_side_stream:
            if self._side_stream is None or self._side_stream.device != device:
                self._side_stream = SideStream(device)
            return self._side_stream.begin(run)
        if self._modes["cuda_graphs"]:  # work for the GPU while the host launches the student's
            maps = run()
            return lambda: maps
        return run

    @torch.no_grad()
    def features(
        self, batched_inputs: List[dict], input_format: str, *, once: bool = False
    ) -> Dict[str, Tensor]:
        """One backbone pass over a batch in the student's input format.

        Args:
            batched_inputs: as a training loader gives them.
            input_format: the channel order of their images.
            once: a batch of no training step: nothing is compiled or recorded for its shape.

        Returns:
            level name -> map of the rescaled images, for the levels of `read_levels` (at first
            all); see `on_input_grid`.
        """
        if input_format != self.input_format:
            batched_inputs = [{**x, "image": x["image"].flip(0)} for x in batched_inputs]
        if self.input_scale != 1:
            batched_inputs = [{**x, "image": self._rescale(x["image"])} for x in batched_inputs]
        images = self.model.preprocess_image(batched_inputs).tensor
        with self._precision_for(images):
            maps = self._backbone(images, once=once)
        return {name: self._own_copy(maps[name]) for name in self._levels}

    def _own_copy(self, x: Tensor) -> Tensor:
        """A map as it is handed out: on a GPU in NCHW, where losses and RoIAlign are faster."""
        if not x.is_cuda:
            return self._returned(x)
        dtype = x.dtype if PRECISIONS[self.precision] is None else torch.float32
        copy = self._modes["cuda_graphs"]  # the next pass writes over a graph's output
        return x.to(dtype, memory_format=torch.contiguous_format, copy=copy)

    def on_input_grid(self, features: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Maps as `features` gave them, brought to the grid of the images before rescaling."""
        if self.input_scale == 1:
            return features
        return {name: _resize(x, 1 / self.input_scale) for name, x in features.items()}

    def _rescale(self, image: Tensor) -> Tensor:
        image = image.to(self.model.device, torch.float32)
        return _resize(image[None], self.input_scale, antialias=True)[0]

    def _precision_for(self, images: Tensor):
        """`_own_precision`, but float32 on images that are too small for bf16."""
        if self.precision == "bf16":
            coarsest = max(x.stride for x in self.output_shape.values())
            if not is_safe_in_bf16(images, coarsest):
                return torch.autocast(images.device.type, enabled=False)
        return self._own_precision()

    def _own_precision(self):
        dtype = PRECISIONS[self.precision]
        if dtype is None:
            return nullcontext()
        if dtype is torch.float32:
            return torch.autocast(self.model.device.type, enabled=False)
        return torch.autocast(self.model.device.type, dtype)

    def _returned(self, x: Tensor) -> Tensor:
        return x if PRECISIONS[self.precision] is None else x.float()

    @torch.no_grad()
    def box_logits(
        self,
        features: Dict[str, Tensor],
        boxes: Tensor,
        image_index: Tensor,
        image_sizes: List[tuple],
    ) -> Tensor:
        """Class logits of the box head for given boxes.

        Args:
            features: this teacher's feature maps.
            boxes: (R, 4) XYXY_ABS, before rescaling.
            image_index: (R,) int64, ascending.
            image_sizes: per-image (height, width), likewise.

        Returns:
            (R, K + 1), background last. A cascade gives the logarithm of the mean probability of
            its stages, whose softmax is what it predicts.
        """
        scale = self.input_scale
        image_sizes = [(round(h * scale), round(w * scale)) for h, w in image_sizes]
        # Heads may log; not among the student's scalars.
        with EventStorage(), self._own_precision():
            return self._returned(
                box_head_logits(
                    self.model.roi_heads, features, boxes * scale, image_index, image_sizes
                )
            )

    @torch.no_grad()
    def dense_outputs(
        self,
        features: Dict[str, Tensor],
        anchors: Sequence[Boxes],
        hidden_depths: Sequence[int] = (),
    ) -> DenseOutputs:
        """What the dense head (RetinaNet's, or the RPN) says of all anchors on this teacher's maps.

        The levels have the teacher's names.

        Args:
            features: this teacher's feature maps.
            anchors: of each level, as its anchor generator would make them on these maps.
            hidden_depths: of a RetinaNet head, the depths of its towers to keep as `hidden`.
        """
        head = find_dense_head(self.model)
        maps = [features[f] for f in head.in_features]
        layers = tower_layers(head.module, hidden_depths) if hidden_depths else {}
        with EventStorage(), self._own_precision(), record_calls(layers) as hidden:
            logits, deltas = ([self._returned(x) for x in out] for out in head.module(maps))
        return DenseOutputs.collect(head, anchors, logits, deltas, hidden)

    def finish_tower(self, maps: Sequence[Tensor], tower: int, depth: int) -> List[Tensor]:
        """Class maps (tower 0) or box maps (1) that the RetinaNet head makes of given maps.

        With gradient for what comes in, and so in the precision of what surrounds it.

        Args:
            maps: of each level of the head, in the place of what its tower holds at the depth.
            tower: see `dense_head.finish_tower`.
            depth: see `DenseOutputs.hidden`.
        """
        return finish_tower(find_dense_head(self.model).module, maps, tower, depth)

    @property
    def scores_single_anchors(self) -> bool:
        """Whether there is `anchor_logits`: with a RetinaNet head without norms in its tower."""
        head = find_dense_head(self.model)
        return head is not None and has_local_classes(head.module)

    @torch.no_grad()
    def anchor_logits(self, features: Dict[str, Tensor], rows: Tensor, num_rows: int) -> Tensor:
        """Class logits (M, K) of (M,) anchors of the `num_rows` that the student has."""
        head = find_dense_head(self.model)
        logits = single_logits if self.model.device.type == "cpu" else window_logits
        with self._own_precision():
            maps = [features[f] for f in head.in_features]
            return self._returned(logits(head.module, maps, rows, num_rows))


def _resize(maps: Tensor, scale: float, antialias: bool = False) -> Tensor:
    """(N, D, H, W) -> (N, D, floor(scale H), floor(scale W)), the top-left corner kept in place."""
    return F.interpolate(
        maps,
        scale_factor=scale,
        mode="bilinear",
        antialias=antialias and scale < 1,
        recompute_scale_factor=False,
    )
