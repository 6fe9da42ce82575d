"""A RetinaNet head's class scores of a few anchors, at the cost of these and not of all.

On a CPU from the cells that they depend on; on a GPU, where the choice of cells would make the host
wait for the device, from a window around each.

Shapes: N images, H x W cells, D channels, M chosen anchors, A anchors of a cell, K classes.
"""

from typing import List, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from ..dense_head import by_cell
from ..sparse_convolution import convolve_cells

#: Windows of `window_logits` that are in memory at a time: 250 MB of a head of four layers' input.
WINDOWS_PER_CHUNK = 2048


def has_local_classes(head: nn.Module) -> bool:
    """Whether `single_logits` can evaluate a head: RetinaNet's, without norms in its tower."""
    return type(head) is RetinaNetHead and all(
        type(layer) in (nn.Conv2d, nn.ReLU) for layer in head.cls_subnet
    )


def window_logits(
    head: RetinaNetHead, maps: Sequence[Tensor], rows: Tensor, num_rows: int
) -> Tensor:
    """As `single_logits`, each anchor from a window of the cells that it depends on.

    Windows overlap, and what they share is computed again; but their number is known, so that a GPU
    need not be waited for.
    """
    num_anchors, counts = _count_anchors(head, maps, num_rows)
    layers = _class_layers(head)
    cuts = [layer.kernel_size[0] // 2 for layer in layers]
    reach = sum(cuts)
    cells_of_window = sum((2 * sum(cuts[i + 1 :]) + 1) ** 2 for i in range(len(cuts)))
    if len(rows) * cells_of_window > len(layers) * num_rows // num_anchors:
        return _logits_of_all(head, maps, num_anchors)[rows]  # costs less than so many windows
    table = torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in maps])  # (cells, D)
    logits = []
    for part in rows.split(WINDOWS_PER_CHUNK):
        cells, on_map, own = _windows(part, maps, counts, num_anchors, reach)
        values = F.embedding(cells, table).permute(0, 3, 1, 2)  # (M, D, window, window)
        for layer, cut in zip(layers, cuts):
            values = values * on_map[:, None]  # what lies outside a map is 0 to each layer
            values = F.conv2d(values, layer.weight, layer.bias)
            values = values if layer is head.cls_score else values.relu()
            on_map = on_map[:, cut : on_map.shape[1] - cut, cut : on_map.shape[2] - cut]
        values = values.flatten(1).unflatten(1, (num_anchors, -1))
        logits.append(values.take_along_dim(own[:, None, None], dim=1).squeeze(1))
    return torch.cat(logits)


def _logits_of_all(head: RetinaNetHead, maps: Sequence[Tensor], num_anchors: int) -> Tensor:
    """(rows, K) of all anchors, in their order."""
    scores = [by_cell(head.cls_score(head.cls_subnet(x)), num_anchors) for x in maps]
    return torch.cat([x.flatten(1, 3) for x in scores], dim=1).flatten(0, 1)


def _windows(
    rows: Tensor, maps: Sequence[Tensor], counts: Sequence[int], num_anchors: int, reach: int
) -> Tuple[Tensor, Tensor, Tensor]:
    """The cells around some anchors, as rows of all maps' cells one after the other.

    Returns:
        (M, window, window) int64 rows, those outside a map moved to its edge; whether they are on
        the map, likewise; (M,) which of its cell's anchors each one is.
    """
    levels, anchors, cells = [], 0, 0  # of each: its first anchor, its first row, its map's size
    for x, count in zip(maps, counts):
        height, width = x.shape[-2:]
        levels.append((anchors, cells, height, width))
        anchors, cells = anchors + count, cells + len(x) * height * width
    levels = torch.tensor(levels).to(rows.device, non_blocking=True)
    image, anchor = rows // anchors, rows % anchors
    level = (anchor[:, None] >= levels[1:, 0]).sum(dim=1)
    first_anchor, first_cell, height, width = levels[level, :, None, None].unbind(dim=1)
    cell = (anchor[:, None, None] - first_anchor) // num_anchors
    around = torch.arange(-reach, reach + 1, device=rows.device)
    y, x = cell // width + around[:, None], cell % width + around  # (M, window, 1), (M, 1, window)
    on_map = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y, x = torch.minimum(y.clamp_min(0), height - 1), torch.minimum(x.clamp_min(0), width - 1)
    rows_of_image = first_cell + image[:, None, None] * height * width
    own = (anchor - first_anchor.flatten()) % num_anchors
    return rows_of_image + y * width + x, on_map, own


def single_logits(
    head: RetinaNetHead, maps: Sequence[Tensor], rows: Tensor, num_rows: int
) -> Tensor:
    """Class logits of some anchors; the box predictions are not computed.

    Args:
        head: a head that `has_local_classes`.
        maps: its levels, (N, D, H, W) each.
        rows: (M,) int64 indices of anchors in Detectron2's order: image, level, y, x, anchor.
        num_rows: how many anchors `rows` choose from; must be as many as the maps have.

    Returns:
        (M, K), equal to what the head gives up to rounding.
    """
    _, counts = _count_anchors(head, maps, num_rows)
    wanted = torch.zeros(num_rows, dtype=torch.bool, device=rows.device)
    wanted[rows] = True
    wanted = wanted.view(len(maps[0]), -1).split(counts, dim=1)
    logits = [
        _class_maps(head, x, mask.unflatten(1, (*x.shape[-2:], -1)).any(dim=3))
        for x, mask in zip(maps, wanted)
    ]
    scores = [x.reshape(len(x), n, -1) for x, n in zip(logits, counts)]
    return torch.cat(scores, dim=1).flatten(0, 1)[rows]


def _count_anchors(
    head: RetinaNetHead, maps: Sequence[Tensor], num_rows: int
) -> Tuple[int, List[int]]:
    """Anchors of a cell, and of one image's maps; `num_rows` must be their sum over the images."""
    num_anchors = head.bbox_pred.out_channels // 4
    counts = [x.shape[-2] * x.shape[-1] * num_anchors for x in maps]
    assert len(maps[0]) * sum(counts) == num_rows, (
        f"{len(maps[0]) * sum(counts)} anchors on the maps, {num_rows} expected: the detectors pad "
        "their inputs to different sizes"
    )
    return num_anchors, counts


def _class_layers(head: RetinaNetHead) -> List[nn.Conv2d]:
    return [x for x in head.cls_subnet if isinstance(x, nn.Conv2d)] + [head.cls_score]


def _class_maps(head: RetinaNetHead, features: Tensor, mask: Tensor) -> Tensor:
    """(N, H, W, A K) class logits where the (N, H, W) mask is set, 0 elsewhere."""
    layers, masks = _class_layers(head), [mask]
    for layer in layers[:0:-1]:  # what a layer reads, the one before it must have computed
        size = layer.kernel_size[0]
        wider = F.max_pool2d(masks[0].float(), size, stride=1, padding=size // 2) > 0
        masks.insert(0, wider)
    for layer, chosen in zip(layers, masks):
        cells = chosen.nonzero()
        values = convolve_cells(layer, features, cells)
        values = values if layer is head.cls_score else values.relu()
        maps = values.new_zeros(*chosen.shape, values.shape[1])
        maps[cells.unbind(dim=1)] = values
        features = maps.permute(0, 3, 1, 2)
    return maps
