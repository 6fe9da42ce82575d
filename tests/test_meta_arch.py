"""The distilling meta-architectures against the stock ones: same detector, terms on top."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, make_batch
from detectron2.modeling import build_model
from detectron2.structures import Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage

STOCK = {"DistillGeneralizedRCNN": "GeneralizedRCNN", "DistillRetinaNet": "RetinaNet"}
TERMS = {"loss_kd_global", "loss_kd_feature", "loss_kd_response"}
both = pytest.mark.parametrize("kind", list(KINDS))


def build(cfg):
    from globalkd.data import register_datasets

    register_datasets(cfg)
    torch.manual_seed(0)
    return build_model(cfg).train()


def stock(cfg):
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = STOCK[cfg.MODEL.META_ARCHITECTURE]
    return build(cfg)


def step(model, batch, iteration=0):
    torch.manual_seed(1)
    with EventStorage(iteration):
        return model(copy.deepcopy(batch))


@both
def test_plain_losses_equal_the_stock_detectors(kind, tiny_cfg, batch):
    cfg = tiny_cfg(kind)
    ours, theirs = step(build(cfg), batch), step(stock(cfg), batch)
    assert set(ours) - set(theirs) == TERMS
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


#: Students with other heads than the quick configurations'.
HEADS = {
    "cascade": ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
    + ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
    "mask": ["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
    + ["MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7],
    "keypoint": ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2]
    + ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,)],
}


@pytest.mark.parametrize("heads", HEADS)
def test_students_with_other_heads_keep_their_losses_and_get_the_terms(heads, tiny_cfg, batch):
    for x in batch:
        boxes = x["instances"].gt_boxes.tensor
        x0, y0, x1, y1 = boxes.unbind(dim=1)
        outlines = torch.stack([x0, y0, x1, y0, x1, y1, x0, y1], dim=1).double().numpy()
        x["instances"].gt_masks = PolygonMasks([[outline] for outline in outlines])
        corners = torch.stack([boxes[:, :2], boxes[:, 2:] - 1], dim=1)  # (R, 2, 2)
        x["instances"].gt_keypoints = Keypoints(F.pad(corners, (0, 1), value=2.0))
    cfg = tiny_cfg("rcnn", *HEADS[heads])
    ours, theirs = step(build(cfg), batch), step(stock(cfg), batch)
    assert set(ours) - set(theirs) == TERMS
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert any(heads in name or "stage" in name for name in theirs)
    assert all(0 < ours[name] < float("inf") for name in TERMS)


@both
def test_evaluation_is_bit_equal_to_the_stock_detector(kind, tiny_cfg, batch):
    cfg = tiny_cfg(kind)
    a, b = build(cfg).eval(), stock(cfg).eval()
    with torch.no_grad():
        ours, theirs = a(batch)[0]["instances"], b(batch)[0]["instances"]
    assert torch.equal(ours.scores, theirs.scores) and len(ours) == len(theirs)
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)


@both
def test_disabled_distillation_is_the_stock_detector(kind, tiny_cfg, batch):
    cfg = tiny_cfg(kind, "MODEL.GLOBALKD.ENABLED", False)
    model, reference = build(cfg), stock(cfg)
    for a, b in zip(_trained(model, batch), _trained(reference, batch)):
        assert torch.equal(a, b)


def _trained(model, batch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        sum(step(model, batch).values()).backward()
        optimizer.step()
    return list(model.state_dict().values())


@both
def test_the_state_dict_is_the_stock_detectors(kind, tiny_cfg):
    cfg = tiny_cfg(kind)
    ours, theirs = build(cfg), stock(cfg)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@both
def test_the_teacher_is_hidden_frozen_and_stays_in_evaluation(kind, tiny_cfg, batch):
    model = build(tiny_cfg(kind))
    teacher = model.distiller.teacher.model
    before = copy.deepcopy(teacher.state_dict())
    sum(step(model, batch).values()).backward()
    model.train()
    inside = {id(m) for m in model.modules()}
    assert id(teacher) not in inside and not teacher.training
    assert not any("teacher" in n and "prototypes" not in n for n, _ in model.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


@both
def test_a_move_of_the_student_moves_the_teacher(kind, tiny_cfg):
    model = build(tiny_cfg(kind)).double()
    assert next(model.distiller.teacher.model.parameters()).dtype == torch.float64


@both
def test_every_trained_parameter_receives_gradient_and_no_hook_stays(kind, tiny_cfg, batch):
    model = build(tiny_cfg(kind))
    terms = {k: v for k, v in step(model, batch).items() if k in TERMS}
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in model.distiller.parameters())
    assert any(p.grad is not None for p in model.backbone.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@both
def test_heads_and_backbones_run_once_a_step(kind, tiny_cfg, batch):
    model = build(tiny_cfg(kind))
    step(model, batch)  # prototypes are made here
    head = model.roi_heads.box_head if kind == "rcnn" else model.head
    counts = {}
    for name, module in {
        "student": model.backbone,
        "teacher": model.distiller.teacher.model.backbone,
        "head": head,
    }.items():
        module.register_forward_hook(lambda *_, n=name: counts.update({n: counts.get(n, 0) + 1}))
    step(model, batch, iteration=1)
    assert counts == {"student": 1, "teacher": 1, "head": 1}


@both
@pytest.mark.parametrize("instances", ["positives", "ground_truth"])
def test_a_batch_without_boxes_gives_zeros_with_gradient(kind, instances, tiny_cfg):
    model = build(tiny_cfg(kind, "MODEL.GLOBALKD.INSTANCES", instances))
    losses = step(model, make_batch([0, 0]))
    for name in TERMS:
        assert losses[name] == 0 and losses[name].requires_grad, name
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.distiller.parameters())


@both
def test_terms_do_not_depend_on_the_size_of_the_batch(kind, tiny_cfg):
    model = build(tiny_cfg(kind, "MODEL.GLOBALKD.INSTANCES", "ground_truth")).train()
    for module in model.modules():  # BatchNorm would couple the images
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images = make_batch([4])
    once, twice = step(model, images), step(model, images * 2)
    for name in ("loss_kd_global", "loss_kd_feature"):
        torch.testing.assert_close(once[name], twice[name], rtol=1e-4, atol=1e-6)


@both
def test_autocast_gives_finite_float32_terms(kind, tiny_cfg, batch):
    model = build(tiny_cfg(kind))
    plain = step(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = step(model, batch)
    for name in TERMS:
        assert mixed[name].dtype == torch.float32 and mixed[name].isfinite(), name
        torch.testing.assert_close(mixed[name], plain[name], rtol=0.3, atol=0.05)


@both
def test_after_the_stop_iteration_terms_are_zero_and_the_teacher_rests(kind, tiny_cfg, batch):
    model = build(tiny_cfg(kind, "MODEL.GLOBALKD.STOP_ITER", 5))
    model.distiller.teacher.model.backbone.register_forward_hook(lambda *_: pytest.fail("ran"))
    losses = step(model, batch, iteration=5)
    assert all(losses[name] == 0 for name in TERMS)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.distiller.parameters())


@pytest.mark.faults
@pytest.mark.parametrize("kind, teacher", [("rcnn", "retinanet"), ("retinanet", "rcnn")])
def test_response_across_families_is_refused_by_name(kind, teacher, tiny_cfg):
    with pytest.raises(ValueError, match=r"\['ResponseKnowledge'\].*heads of one kind"):
        build(tiny_cfg(kind, teacher=teacher))


@pytest.mark.parametrize("kind, teacher", [("rcnn", "retinanet"), ("retinanet", "rcnn")])
def test_features_and_global_knowledge_cross_families(kind, teacher, tiny_cfg, batch):
    losses = ["GlobalKnowledge", "FeatureKnowledge"]
    model = build(tiny_cfg(kind, "MODEL.GLOBALKD.LOSSES", losses, teacher=teacher))
    assert {p.student for p in model.distiller.levels} == {"p3", "p4", "p5", "p6"}
    assert all(step(model, batch)[f"loss_kd_{n}"] > 0 for n in ("global", "feature"))


@pytest.mark.faults
def test_unknown_loss_names_the_key_and_what_is_registered(tiny_cfg):
    with pytest.raises(ValueError, match=r"LOSSES names 'Nope'.*FeatureKnowledge"):
        build(tiny_cfg("rcnn", "MODEL.GLOBALKD.LOSSES", ["Nope"]))


@pytest.mark.faults
def test_no_loss_with_a_weight_is_refused(tiny_cfg):
    with pytest.raises(ValueError, match="ENABLED False"):
        build(tiny_cfg("rcnn", "MODEL.GLOBALKD.LOSSES", []))


def test_inherited_heads_are_the_teachers(tiny_cfg, batch):
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.INHERIT_TEACHER_HEADS", True)
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = ["MODEL.RESNETS.DEPTH", 34]
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 256
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    model = build(cfg)
    step(model, batch)
    teacher = model.distiller.teacher.model.state_dict()
    state = model.state_dict()
    assert torch.equal(
        state["roi_heads.box_head.fc1.weight"], teacher["roi_heads.box_head.fc1.weight"]
    )
    assert not torch.equal(
        state["backbone.bottom_up.stem.conv1.weight"],
        teacher["backbone.bottom_up.stem.conv1.weight"],
    )
