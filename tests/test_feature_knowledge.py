"""The feature term: its adapters on a few cells compute what they compute on whole maps."""

import pytest
import torch
from toy_step import attach, leaves, toy_bank, toy_step

from globalkd.losses import FeatureKnowledge
from globalkd.losses.base import InstanceRows
from globalkd.losses.masks import box_masks, instance_masks


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("counts", [(3, 1), (0, 0)])
def test_cells_inside_boxes_give_what_whole_maps_give(relu, counts, monkeypatch):
    results = []
    for whole in (False, True):
        context = toy_step(counts, bank=toy_bank())
        loss = attach(FeatureKnowledge(adapter_relu=relu), context)
        monkeypatch.setattr(loss, "_whole_maps", lambda _context, whole=whole: whole)
        term = loss(context)["loss_kd_feature"]
        maps = [x for x in leaves(context) if x.dim() == 4]
        inputs = [*maps[: len(context.levels)], *loss.parameters()]
        results.append([term, *torch.autograd.grad(term, inputs)])
    for inside, dense in zip(*results):
        torch.testing.assert_close(inside, dense)


def test_the_background_term_still_sees_every_cell():
    context = toy_step(bank=toy_bank())
    loss = attach(FeatureKnowledge(background_weight=4.0), context)
    terms = loss(context)
    (grad,) = torch.autograd.grad(terms["loss_kd_background"], [context.student_maps["p3"]])
    outside = instance_masks(loss, context, share=False)[0] == 0
    assert outside.any() and (grad.abs().sum(dim=1)[outside] > 0).all()


def test_equal_boxes_give_each_instance_one_weight_in_all():
    rows = InstanceRows(
        boxes=torch.tensor([[0.0, 0, 8, 8], [16, 16, 64, 48]]),
        image_index=torch.tensor([0, 1]),
        classes=torch.tensor([0, 0]),
    )
    weights = [torch.tensor([1.0, 0.5])]
    (mask,) = box_masks(rows, weights, sizes=[(2, 8, 8)], strides=[8], share=True)
    torch.testing.assert_close(mask.sum(dim=(1, 2)), torch.tensor([1.0, 0.5]))
    (whole,) = box_masks(rows, weights, sizes=[(2, 8, 8)], strides=[8])
    assert ((mask > 0) == (whole > 0)).all() and whole.sum() == 1.0 + 24 * 0.5

    context = toy_step(bank=toy_bank())
    loss = attach(FeatureKnowledge(), context)
    by_cells = loss(context)["loss_kd_feature"]
    loss.equal_boxes = True
    assert not torch.isclose(loss(context)["loss_kd_feature"], by_cells)
