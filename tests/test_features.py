"""Recording, level matching and pooling: properties of `globalkd.features`."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn
from torchvision.ops import roi_align

from globalkd.features import (
    InstancePooler,
    crop_to_common,
    match_levels,
    record_outputs,
    to_rois,
)


def shapes(levels, channels=8):
    return {f"p{i}": ShapeSpec(channels=channels, stride=2**i) for i in levels}


def test_recorded_output_is_what_the_module_returned_with_its_gradient():
    module = nn.Linear(2, 2)
    with record_outputs({"out": module}) as recorded:
        result = module(torch.ones(1, 2))
    assert recorded["out"] is result and result.requires_grad


def test_hooks_are_gone_after_the_block_even_after_an_error():
    module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), record_outputs({"out": module}):
        raise RuntimeError
    assert not module._forward_hooks


def test_levels_are_matched_by_stride_and_named_after_the_student():
    teacher = {"res4": ShapeSpec(channels=32, stride=16), "res3": ShapeSpec(channels=16, stride=8)}
    pairs = match_levels(shapes(range(2, 7)), teacher)
    assert [(p.student, p.teacher, p.stride) for p in pairs] == [
        ("p3", "res3", 8),
        ("p4", "res4", 16),
    ]
    assert pairs[0].teacher_channels == 16 and pairs[0].student_channels == 8


def test_of_two_levels_of_one_stride_the_one_of_the_same_name_is_the_partner():
    dilated = {n: ShapeSpec(channels=8, stride=16) for n in ("res4", "res5")}
    (pair,) = match_levels({"res4": ShapeSpec(channels=8, stride=16)}, dilated)
    assert pair.teacher == "res4"


@pytest.mark.faults
def test_unknown_level_names_the_key_and_what_there_is():
    with pytest.raises(ValueError, match=r"IN_FEATURES names \['p9'\].*'p2', 'p3'"):
        match_levels(shapes([2, 3]), shapes([2, 3]), ["p9"])


@pytest.mark.faults
def test_level_without_partner_is_an_error_if_it_was_asked_for():
    with pytest.raises(ValueError, match=r"\['p2'\].*no partner in the teacher"):
        match_levels(shapes([2, 3]), shapes([3]), ["p2", "p3"])
    with pytest.raises(ValueError, match="no partner"):
        match_levels(shapes([2]), shapes([3]))


@pytest.mark.parametrize("pool", ["_by_kernel", "_by_product"])
def test_pooler_equals_the_mean_of_a_roi_align_grid(pool):
    """On every device: boxes inside, over the border, outside, empty, and in any order."""
    torch.manual_seed(0)
    features = torch.randn(2, 4, 16, 14, requires_grad=True)
    rois = torch.tensor(
        [
            [1, 0.0, 0.0, 9.0, 60.0],
            [0, 3.0, 5.0, 40.0, 50.0],
            [1, -20.0, 30.0, 30.0, 90.0],
            [0, 100.0, 5.0, 140.0, 50.0],
            [0, 20.0, 20.0, 20.0, 20.0],
        ]
    )
    ours = getattr(InstancePooler(6), pool)(features, rois, 1 / 4)
    grid = roi_align(features, rois, 6, 1 / 4, sampling_ratio=1, aligned=True).mean(dim=(2, 3))
    torch.testing.assert_close(ours, grid)
    factor = torch.randn_like(grid)
    grads = [torch.autograd.grad((x * factor).sum(), features)[0] for x in (ours, grid)]
    torch.testing.assert_close(*grads)


def test_each_box_is_pooled_from_its_own_image():
    features = torch.stack([torch.full((3, 8, 8), float(i)) for i in range(3)])
    box = torch.tensor([[4.0, 4.0, 20.0, 20.0]])
    pooled = InstancePooler(3)(features, to_rois([box, box, box]), stride=4)
    torch.testing.assert_close(pooled, torch.arange(3.0)[:, None].expand(3, 3))


def test_no_boxes_pool_to_nothing_that_still_carries_gradient():
    features = torch.randn(2, 4, 8, 8, requires_grad=True)
    pooled = InstancePooler(3)(features, to_rois([torch.zeros(0, 4)] * 2), stride=4)
    assert pooled.shape == (0, 4)
    pooled.sum().backward()
    assert features.grad.abs().sum() == 0


def test_pooler_is_float32_under_autocast():
    features = torch.randn(1, 4, 8, 8)
    rois = to_rois([torch.tensor([[4.0, 4.0, 20.0, 20.0]])])
    plain = InstancePooler(3)(features, rois, stride=4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(InstancePooler(3)(features, rois, stride=4), plain)


@pytest.mark.faults
def test_pooler_resolution_below_one_names_the_key():
    with pytest.raises(ValueError, match="POOLER_RESOLUTION is 0"):
        InstancePooler(0)


def test_maps_of_other_padding_are_cut_to_their_common_corner():
    big, small = torch.randn(1, 2, 9, 7), torch.randn(1, 3, 8, 8)
    a, b = crop_to_common(big, small)
    assert a.shape[-2:] == b.shape[-2:] == (8, 7)
    assert torch.equal(a, big[..., :8, :7])
