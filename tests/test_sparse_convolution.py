"""Convolutions at a few cells equal the whole maps' there."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.utils.events import EventStorage
from torch import nn

from globalkd.data import register_datasets
from globalkd.sparse_convolution import convolve_cells
from globalkd.teacher import Teacher, anchor_logits
from globalkd.teacher.anchor_logits import has_local_classes, single_logits, window_logits

CLASSES, CHANNELS = 5, 8


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_convolution_at_cells_is_the_convolution_there(size):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, size, padding=size // 2)
    features = torch.randn(2, 4, 7, 5, requires_grad=True)
    cells = (torch.rand(2, 7, 5) > 0.5).nonzero()  # border cells among them
    image, y, x = cells.unbind(1)
    inputs = [features, *conv.parameters()]
    direct = conv(features)[image, :, y, x]
    ours = convolve_cells(conv, features, cells)
    torch.testing.assert_close(ours, direct)
    factor = torch.randn_like(direct)
    expected = torch.autograd.grad((direct * factor).sum(), inputs)
    found = torch.autograd.grad((ours * factor).sum(), inputs)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_no_cells_give_nothing_that_still_carries_gradient():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    features = torch.randn(2, 4, 7, 5, requires_grad=True)
    ours = convolve_cells(conv, features, torch.zeros(0, 3, dtype=torch.long))
    assert ours.shape == (0, 6)
    ours.sum().backward()
    assert not features.grad.any() and not conv.weight.grad.any()


def retinanet_head(norm=""):
    torch.manual_seed(0)
    strides = [8, 16]
    shapes = [ShapeSpec(channels=CHANNELS, stride=s) for s in strides]
    head = RetinaNetHead(
        input_shape=shapes,
        num_classes=CLASSES,
        num_anchors=DefaultAnchorGenerator(
            sizes=[[16, 24]], aspect_ratios=[[1.0]], strides=strides
        ).num_anchors[0],
        conv_dims=[CHANNELS, CHANNELS],
        norm=norm,
    )
    for parameter in head.parameters():  # the head's own start has almost no spatial structure
        nn.init.normal_(parameter, std=0.3)
    return head


@pytest.mark.parametrize("count", [0, 1, 12, 80])  # of the last, windows would cost too much
@torch.no_grad()
def test_logits_of_some_anchors_are_the_heads(count, monkeypatch):
    head = retinanet_head()
    maps = [torch.randn(2, CHANNELS, *size) for size in ((9, 7), (5, 4))]
    whole = [x.unflatten(1, (2, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in head(maps)[0]]
    whole = torch.cat(whole, dim=1).flatten(0, 1)
    rows = torch.randperm(len(whole))[:count].sort().values
    monkeypatch.setattr(anchor_logits, "WINDOWS_PER_CHUNK", 5)
    for logits in (single_logits, window_logits):
        torch.testing.assert_close(logits(head, maps, rows, len(whole)), whole[rows])


def test_a_tower_with_norms_needs_whole_maps():
    assert has_local_classes(retinanet_head())
    assert not has_local_classes(retinanet_head("BN")) and not has_local_classes(nn.ReLU())


def test_the_response_term_is_that_of_the_whole_head(tiny_cfg, batch, monkeypatch):
    cfg = tiny_cfg("retinanet", "MODEL.GLOBALKD.LOSSES", ["ResponseKnowledge"])
    cfg.MODEL.GLOBALKD.TEACHER.OPTS += ["MODEL.RETINANET.NORM", ""]
    register_datasets(cfg)
    model = build_model(cfg).train()
    assert model.distiller.teacher.scores_single_anchors
    terms = []
    for single in (True, False):
        monkeypatch.setattr(Teacher, "scores_single_anchors", single)
        with EventStorage(0):
            terms.append(model(batch)["loss_kd_response"])
    assert terms[0] > 0
    torch.testing.assert_close(*terms)


@pytest.mark.parametrize("order", [1, -1])
def test_single_anchors_are_not_scored_where_another_loss_reads_all(
    order, tiny_cfg, batch, monkeypatch
):
    """Whatever the order of the losses, the teacher's dense head runs once, on whole maps."""
    losses = ["ResponseKnowledge", "PredictionGuidedImitation"][::order]
    cfg = tiny_cfg("retinanet", "MODEL.GLOBALKD.LOSSES", losses)
    cfg.MODEL.GLOBALKD.TEACHER.OPTS += ["MODEL.RETINANET.NORM", ""]
    register_datasets(cfg)
    model = build_model(cfg).train()
    monkeypatch.setattr(Teacher, "anchor_logits", lambda *args: pytest.fail("scored one by one"))
    with EventStorage(0):
        assert model(batch)["loss_kd_response"] > 0
