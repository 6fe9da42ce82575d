"""RoIAlign by sums of cells is torchvision's."""

import itertools

import pytest
import torch
import torchvision.ops
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from globalkd import sparse_roi_align
from globalkd.sparse_roi_align import TeacherROIAlign, roi_align

SETTINGS = list(itertools.product([1, 7, (2, 5)], [1.0, 0.25], [0, 1, 2, 7], [False, True]))


@pytest.fixture
def features():
    torch.manual_seed(0)
    return torch.randn(3, 6, 19, 26).contiguous(memory_format=torch.channels_last)


def random_boxes(count):
    corners = torch.rand(count, 2, 2).sort(dim=1).values * torch.tensor([104.0, 76.0])
    return torch.cat([torch.randint(0, 3, (count, 1)).float(), corners.flatten(1)], dim=1)


def both(features, boxes, *settings):
    expected = torchvision.ops.roi_align(features, boxes, *settings)
    return roi_align(features, boxes, *settings), expected


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_torchvision(features, settings):
    torch.testing.assert_close(*both(features, random_boxes(40), *settings))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "box",
    [
        (5.0, 5.0, 5.0, 5.0),  # no area
        (9.0, 9.0, 3.0, 2.0),  # negative sides
        (-30.0, -20.0, 160.0, 130.0),  # larger than the image
        (-90.0, -80.0, -50.0, -40.0),  # beside it
        (300.0, 300.0, 400.0, 400.0),
        (0.0, 10.0, 104.0, 11.0),  # a line
        (2.0, 2.0, 2.001, 2.001),
        (101.0, 73.0, 104.0, 76.0),  # in the last corner
    ],
)
def test_unusual_boxes_equal_torchvision(features, box, settings):
    boxes = torch.tensor([[1.0, *box], [2.0, 8.0, 8.0, 40.0, 30.0]])
    torch.testing.assert_close(*both(features, boxes, *settings))


def test_no_boxes_give_nothing(features):
    found, expected = both(features, torch.zeros(0, 5), 7, 0.25, 0, True)
    assert found.shape == expected.shape == (0, 6, 7, 7)


def test_any_size_of_a_chunk_gives_the_same(features, monkeypatch):
    boxes = random_boxes(40)
    whole = roi_align(features, boxes, 7, 0.25, 0, True)
    monkeypatch.setattr(sparse_roi_align, "PAIRS_PER_CHUNK", 1)
    torch.testing.assert_close(roi_align(features, boxes, 7, 0.25, 0, True), whole)


def test_maps_that_need_gradient_get_it(features):
    features.requires_grad_(True)
    boxes = random_boxes(5)
    ours, direct = both(features, boxes, 3, 0.25, 2, True)
    assert torch.equal(ours, direct)
    (gradient,) = torch.autograd.grad(ours.square().sum(), features)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert not roi_align(features, boxes, 3, 0.25, 2, True).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_keeps_the_dtype_of_the_map(features, dtype):
    with torch.autocast("cpu", torch.bfloat16):
        assert TeacherROIAlign((7, 7), 0.25, 0)(features.to(dtype), random_boxes(4)).dtype == dtype


@pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIAlignV2"])
def test_a_pooler_of_several_levels_gives_the_same_with_it(pooler_type):
    torch.manual_seed(0)
    pooler = ROIPooler(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, pooler_type, canonical_box_size=32)
    maps = [torch.randn(2, 5, 128 >> i, 128 >> i) for i in range(4)]
    boxes = [Boxes(random_boxes(30)[:, 1:]) for _ in maps[0]]
    before = pooler(maps, boxes)
    TeacherROIAlign.replace_in(pooler)
    kinds = {type(m) for m in pooler.level_poolers}
    assert kinds == {TeacherROIAlign} and ROIAlign not in kinds
    torch.testing.assert_close(pooler(maps, boxes), before)
