"""From detectors to features: recorded module outputs, matched levels, pooled instances.

What losses, extraction and analysis read passes through here. Nothing here knows a dataset, a
prototype or a loss.

Shapes: N images, L levels, H x W cells of a level, R boxes, D channels.
"""

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Dict, Hashable, Iterator, List, Mapping, Sequence, Tuple

import torch
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn
from torchvision.ops import roi_align

from .requirement import require


@contextmanager
def record_outputs(modules: Mapping[str, nn.Module]) -> Iterator[Dict[str, Any]]:
    """Record what modules return while the block runs; the hooks are removed at its end.

    Args:
        modules: name -> module. Their outputs are kept as they are, with their gradient.

    Yields:
        name -> the module's first output; a name is absent until its module has run. That a module
        ran again, as a second pass over other images does, is said once.
    """
    outputs: Dict[str, Any] = {}

    def keep(name: str, output: Any) -> None:
        if name in outputs:
            log_first_n(
                logging.WARNING,
                f"The student's {name} runs several times in a training step: what it gave first "
                "is distilled.",
                name=__name__,
                key="message",
            )
        outputs.setdefault(name, output)

    with _hooked(modules, keep):
        yield outputs


@contextmanager
def record_calls(modules: Mapping[Hashable, nn.Module]) -> Iterator[Dict[Hashable, List[Any]]]:
    """As `record_outputs`, but all that a module returns while the block runs, call by call."""
    outputs: Dict[Hashable, List[Any]] = {name: [] for name in modules}
    with _hooked(modules, lambda name, output: outputs[name].append(output)):
        yield outputs


@contextmanager
def _hooked(modules: Mapping, keep: Callable[[Hashable, Any], None]) -> Iterator[None]:
    def hook(name):
        return lambda _module, _inputs, output: keep(name, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class LevelPair:
    """A level that both detectors have.

    Attributes:
        student: the student's name of it, and its name everywhere in this project.
        teacher: the teacher's.
        stride: input pixels a cell.
        student_channels: D_s.
        teacher_channels: D_t.
    """

    student: str
    teacher: str
    stride: int
    student_channels: int
    teacher_channels: int


def match_levels(
    student: Mapping[str, ShapeSpec],
    teacher: Mapping[str, ShapeSpec],
    in_features: Sequence[str] = (),
) -> List[LevelPair]:
    """Pair feature maps of equal stride, finest first.

    Args:
        student: the student backbone's `output_shape()`.
        teacher: the teacher backbone's.
        in_features: the student's levels to keep; empty for all that have a partner.

    Raises:
        ValueError: a level that the student has not, or that has no partner in the teacher.
    """
    unknown = [name for name in in_features if name not in student]
    if unknown:
        raise ValueError(
            f"MODEL.GLOBALKD.IN_FEATURES names {unknown}, but the student's backbone has "
            f"{sorted(student)}."
        )
    by_stride = {shape.stride: name for name, shape in teacher.items()}
    names = sorted(in_features or student, key=lambda name: student[name].stride)

    def partner(name: str) -> str:  # of two levels of one stride (dilated C5) that of its name
        stride = student[name].stride
        same = name in teacher and teacher[name].stride == stride
        return name if same else by_stride[stride]

    pairs = [
        LevelPair(
            student=name,
            teacher=partner(name),
            stride=student[name].stride,
            student_channels=student[name].channels,
            teacher_channels=teacher[partner(name)].channels,
        )
        for name in names
        if student[name].stride in by_stride
    ]
    alone = [name for name in names if student[name].stride not in by_stride]
    if not pairs or (alone and in_features):
        raise ValueError(
            f"MODEL.GLOBALKD.IN_FEATURES: the student's levels {alone} with strides "
            f"{[student[n].stride for n in alone]} have no partner in the teacher, whose strides "
            f"are {sorted(by_stride)}."
        )
    return pairs


def crop_to_common(student: Tensor, teacher: Tensor) -> Tuple[Tensor, Tensor]:
    """Cut two (N, *, H, W) maps of equal stride to their common top-left area.

    Detectors pad to different multiples; the padding lies at the right and at the bottom.
    """
    height = min(student.shape[-2], teacher.shape[-2])
    width = min(student.shape[-1], teacher.shape[-1])
    return student[..., :height, :width], teacher[..., :height, :width]


def align_levels(
    levels: Sequence[LevelPair],
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    image_sizes: Sequence[Tuple[int, int]],
    scale: float = 1.0,
) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
    """Pick the matched levels out of both detectors' maps and cut them to equal size.

    Args:
        student: level -> map.
        teacher: likewise, on the grid of the student's input.
        image_sizes: (height, width) of each image.
        scale: at which size, in units of these, the teacher saw the images.

    Returns:
        The student's and the teacher's maps, both by the student's names.

    Raises:
        ValueError: maps are of less than their images, or of another number.
    """
    for pair in levels:
        _check_cover(student[pair.student], pair, "student", image_sizes)
        _check_cover(teacher[pair.teacher], pair, "teacher", image_sizes, scale)
    pairs = [crop_to_common(student[p.student], teacher[p.teacher]) for p in levels]
    names = [p.student for p in levels]
    return dict(zip(names, [s for s, _ in pairs])), dict(zip(names, [t for _, t in pairs]))


def _check_cover(
    features: Tensor,
    pair: LevelPair,
    owner: str,
    image_sizes: Sequence[Tuple[int, int]],
    scale: float = 1.0,
) -> None:
    height, width = (max(size) for size in zip(*image_sizes))
    if len(features) != len(image_sizes):
        raise ValueError(
            f"The {owner}'s map of level {pair.student} is of {len(features)} images, but there "
            f"are {len(image_sizes)}: a backbone that makes several of one (TridentNet) cannot be "
            "distilled."
        )
    covered = [n * pair.stride for n in features.shape[-2:]]
    rounding = 2 * pair.stride / min(scale, 1.0)
    if covered[0] + rounding < height or covered[1] + rounding < width:
        raise ValueError(
            f"The {owner}'s map of level {pair.student} covers {covered[0]} x {covered[1]} pixels "
            f"of images of up to {height} x {width}: its backbone cuts them off (square_pad). "
            "Lower INPUT.MAX_SIZE_TRAIN and MAX_SIZE_TEST, or give it a larger square_pad."
        )


def to_rois(boxes: Sequence[Tensor]) -> Tensor:
    """Stack per-image (R_i, 4) boxes as (R, 5) float rows: image index, x1, y1, x2, y2."""
    image_index = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
    return torch.cat([torch.cat(image_index), torch.cat(list(boxes))], dim=1)


def by_image(rois: Tensor, num_images: int) -> List[Boxes]:
    """The boxes of each image: of (R, 5) rows as of `to_rois`, image by image. Waits for a GPU."""
    images = torch.arange(num_images, device=rois.device)
    counts = (rois[:, 0] == images[:, None]).sum(dim=1).tolist()  # bincount would wait twice
    return [Boxes(own) for own in rois[:, 1:].split(counts)]


def assigned_levels(pooler: ROIPooler, boxes: Tensor) -> Tensor:
    """(R,) int64, from which of a pooler's levels, 0 the finest, it pools each (R, 4) box."""
    return assign_boxes_to_levels(
        [Boxes(boxes)],
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )


def pools_without_waiting(pooler: ROIPooler) -> bool:
    """Whether `pool` can pool on a GPU without making the host wait for it."""
    return type(pooler) is ROIPooler and all(isinstance(x, ROIAlign) for x in pooler.level_poolers)


def pool(pooler: ROIPooler, maps: List[Tensor], rois: Tensor) -> Tensor:
    """What a pooler of Detectron2 gives for boxes, each from the level that it belongs to.

    Args:
        pooler: the pooler.
        maps: of its levels, (N, D, H, W) each.
        rois: (R, 5) rows of image index, ascending, and XYXY_ABS box.

    Returns:
        (R, D, B, B').
    """
    if rois.is_cuda and pools_without_waiting(pooler):
        return pool_without_waiting(pooler, maps, rois)
    return pooler(maps, by_image(rois, len(maps[0])))


#: A coordinate in pixels that RoIAlign takes for outside of the image on every level.
_OUTSIDE = -1e4


def pool_without_waiting(pooler: ROIPooler, maps: List[Tensor], rois: Tensor) -> Tensor:
    """`pool` for a GPU.

    Detectron2's own asks which boxes belong to a level, level by level. Here each level pools all
    of them, moved out of the image where they are not its own: there nothing is read or written.
    """
    level = assigned_levels(pooler, rois[:, 1:])
    pooled = None
    for index, (x, align) in enumerate(zip(maps, pooler.level_poolers)):
        own = level == index
        boxes = torch.where(own[:, None], rois[:, 1:], _OUTSIDE)
        part = align(x, torch.cat([rois[:, :1], boxes], dim=1))
        pooled = part if pooled is None else torch.where(own[:, None, None, None], part, pooled)
    return pooled


class InstancePooler(nn.Module):
    """RoIAlign of every box on every level, averaged over the grid (Sec. 3.3: each map by itself).

    Averaging a G x G RoIAlign output equals one bin with G x G sampling points, which is what is
    computed: the (R, D, G, G) tensor never exists.
    """

    def __init__(self, resolution: int):
        """
        Args:
            resolution: sampling points per side, G.
        """
        super().__init__()
        require("POOLER_RESOLUTION", resolution, resolution >= 1, "1 or more")
        self.resolution = resolution

    def forward(self, features: Tensor, rois: Tensor, stride: int) -> Tensor:
        """
        Args:
            features: (N, D, H, W) map of one level.
            rois: (R, 5) rows of image index and XYXY_ABS box in input pixels; see `to_rois`.
            stride: input pixels per cell.

        Returns:
            (R, D) float32, differentiable in `features`; (0, D) without boxes.
        """
        average = self._by_kernel if features.is_cuda else self._by_product
        with torch.autocast(features.device.type, enabled=False):
            return average(features.float(), rois.float(), 1.0 / stride)

    def _by_kernel(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        pooled = roi_align(
            features,
            rois,
            output_size=1,
            spatial_scale=scale,
            sampling_ratio=self.resolution,
            aligned=True,
        )
        return pooled.flatten(1)

    def _by_product(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        """The same as one matrix product an image: on a CPU RoIAlign runs on a single core."""
        image, boxes = rois[:, 0], rois[:, 1:] * scale - 0.5
        height, width = features.shape[-2:]
        along_y = self._axis_weights(boxes[:, 1], boxes[:, 3], height)
        along_x = self._axis_weights(boxes[:, 0], boxes[:, 2], width)
        weights = (along_y[:, :, None] * along_x[:, None, :]).flatten(1)  # (R, H W)
        rows = [(image == i).nonzero().squeeze(1) for i in range(len(features))]
        pooled = [weights[r] @ x.flatten(1).T for r, x in zip(rows, features.unbind())]
        return torch.cat(pooled)[torch.cat(rows).argsort()]

    def _axis_weights(self, start: Tensor, stop: Tensor, size: int) -> Tensor:
        """(R, size) share of each cell in an interval's mean, by RoIAlign's rules for one axis."""
        steps = (torch.arange(self.resolution, device=start.device) + 0.5) / self.resolution
        points = start[:, None] + (stop - start)[:, None] * steps  # (R, G) in cells
        inside = (points >= -1) & (points <= size)
        distance = points.clamp(0, size - 1)[..., None] - torch.arange(size, device=start.device)
        return ((1 - distance.abs()).clamp_min(0) * inside[..., None]).mean(dim=1)
