"""The distilling meta-architectures against the stock ones: same detector, terms on top."""

import copy
import gc
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, make_batch
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.modeling.proposal_generator.rrpn import RRPN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage

from globalkd.data import register_datasets
from globalkd.distiller import Distiller
from globalkd.losses import (
    DISTILL_LOSS_REGISTRY,
    DistillContext,
    DistillLoss,
    FeatureKnowledge,
    HintonKD,
    Positives,
)
from globalkd.meta_arch import DistillGeneralizedRCNN, DistillMixin
from globalkd.pairing import check_pair, inherit_heads
from globalkd.teacher import Teacher

STOCK = {"DistillGeneralizedRCNN": "GeneralizedRCNN", "DistillRetinaNet": "RetinaNet"}
TERMS = {"loss_kd_global", "loss_kd_feature", "loss_kd_response"}
both = pytest.mark.parametrize("kind", list(KINDS))


def build(cfg):
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
    + ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,)]
    + ["MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", 0],
}


C4 = [
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res4"]),
    *("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
    *("MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]]),
    *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 14),
]


def test_a_c4_student_learns_from_a_pyramid(tiny_cfg, batch):
    """Its heads return no proposals; its one level has a partner in the teacher."""
    cfg = tiny_cfg("rcnn", *C4)
    model = build(cfg)
    assert [(p.student, p.teacher) for p in model.distiller.levels] == [("res4", "p4")]
    ours, theirs = step(model, batch), step(stock(cfg), batch)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert all(0 < ours[name] < float("inf") for name in TERMS)
    sum(ours.values()).backward()


def test_the_teacher_scores_the_boxes_that_the_student_scored(tiny_cfg, batch):
    """With TRAIN_ON_PRED_BOXES the student's proposals move after they are scored."""
    model = build(tiny_cfg("rcnn", "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True))
    torch.nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.1)
    scored, outputs = [], model._outputs
    model.roi_heads.box_pooler.register_forward_pre_hook(
        lambda _, inputs: scored.append(torch.cat([x.tensor.clone() for x in inputs[1]]))
    )

    def check(recorded):
        student = outputs(recorded)
        assert torch.equal(student.candidates.boxes, scored[0])
        assert torch.equal(student.positives.boxes, scored[0][student.positives.rows])
        return student

    model._outputs = check
    step(model, batch)
    assert "losses" not in vars(model.roi_heads.box_predictor)


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
@pytest.mark.parametrize("instances", ["positives", "ground_truth"])
def test_no_map_of_a_step_outlives_it(kind, instances, tiny_cfg, batch):
    """Without Python's collector of cycles: it does not know that a GPU's memory is running out."""
    cfg = tiny_cfg(kind, "MODEL.GLOBALKD.INSTANCES", instances)
    cfg.MODEL.GLOBALKD.LOSSES += ["PixelRelation", "InstanceRelation", "InstanceFeature", "FGFI"]
    cfg.MODEL.GLOBALKD.PROTOTYPES.REFRESH = "harvest"
    model = build(cfg)
    maps = []
    for module in (model.backbone, model.distiller.teacher.model.backbone.bottom_up):
        module.register_forward_hook(lambda *args: maps.extend(map(weakref.ref, args[2].values())))
    step(model, batch)  # prototypes are made here
    maps.clear()
    gc.collect()
    gc.disable()
    try:
        step(model, batch, iteration=1)
        assert maps and not any(m() is not None for m in maps)
    finally:
        gc.enable()


@both
def test_images_are_sent_to_the_device_once(kind, tiny_cfg, batch, monkeypatch):
    """What either detector is given is there already."""
    model = build(tiny_cfg(kind))
    step(model, batch)  # prototypes are made here
    monkeypatch.setattr(type(model), "device", torch.device("meta"))  # stands for a GPU
    seen = []

    def begin(batched_inputs):
        seen.extend(x["image"].device.type for x in batched_inputs)
        raise InterruptedError

    monkeypatch.setattr(model.distiller, "begin", begin)
    with pytest.raises(InterruptedError):
        step(model, batch, iteration=1)
    assert seen == ["meta"] * len(batch)


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
def test_the_weight_multiplies_every_distillation_term_and_no_other(kind, tiny_cfg, batch):
    once, thrice = (
        step(build(tiny_cfg(kind, "MODEL.GLOBALKD.WEIGHT", weight)), batch) for weight in (1.0, 3.0)
    )
    for name in once:
        factor = 3 if name in TERMS else 1
        torch.testing.assert_close(thrice[name], factor * once[name], msg=name)


@pytest.mark.faults
@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_is_no_positive_number_is_refused(weight, tiny_cfg):
    with pytest.raises(ValueError, match="MODEL.GLOBALKD.WEIGHT is .*finite number above 0"):
        build(tiny_cfg("rcnn", "MODEL.GLOBALKD.WEIGHT", weight))


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
def test_a_teacher_of_other_classes_can_teach_what_compares_no_predictions(tiny_cfg):
    cfg = tiny_cfg("rcnn")
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = ["MODEL.ROI_HEADS.NUM_CLASSES", 12]
    remedy = r"losses out of MODEL.GLOBALKD.LOSSES and set .*TEACHER.ALLOW_OTHER_CLASSES True"
    with pytest.raises(ValueError, match=rf"\['ResponseKnowledge'\] compare .*{remedy}"):
        build(cfg)
    cfg.MODEL.GLOBALKD.LOSSES = ["GlobalKnowledge", "FeatureKnowledge"]
    cfg.MODEL.GLOBALKD.TEACHER.ALLOW_OTHER_CLASSES = True
    assert build(cfg).distiller.teacher.num_classes == 12


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


def test_without_a_pyramid_the_backbone_inherits_nothing(tiny_cfg):
    """The teacher's norms are folded into its convolutions, the student's are not."""
    cfg = tiny_cfg("rcnn", *C4)
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = [*C4, "MODEL.RESNETS.DEPTH", 50]
    model = build(cfg)
    before = copy.deepcopy(model.backbone.state_dict())
    names = inherit_heads(model, model.distiller.teacher.model)
    assert any(x.startswith("roi_heads.res5.") for x in names)
    assert not any(x.startswith("backbone.") for x in names)
    assert all(torch.equal(before[k], x) for k, x in model.backbone.state_dict().items())


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN"])
def test_an_inherited_pyramid_maps_as_the_teachers(norm, tiny_cfg):
    cfg = tiny_cfg("rcnn", "MODEL.FPN.NORM", norm, "MODEL.FPN.OUT_CHANNELS", 64)
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = ["MODEL.FPN.NORM", norm]
    model = build(cfg)
    teacher = model.distiller.teacher.model
    for fpn in (model.backbone, teacher.backbone):  # norms that do something
        for name, buffer in fpn.named_buffers():
            if "bottom_up" not in name and name.endswith("running_var"):
                torch.nn.init.uniform_(buffer, 0.5, 2.0)
    inherit_heads(model, teacher)
    images = torch.randn(1, 3, 64, 64)
    model.eval()
    features = model.backbone.bottom_up(images)
    for fpn in (model.backbone, teacher.backbone):
        fpn.bottom_up.forward = lambda _: features
    with torch.no_grad():
        ours, theirs = model.backbone(images), teacher.backbone(images)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4)


def test_a_pass_without_gradient_is_no_step(tiny_cfg, batch):
    """Statistics of norms (PreciseBN), losses of validation data: the student stays as it is."""
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.INHERIT_TEACHER_HEADS", True)
    cfg.MODEL.GLOBALKD.PROTOTYPES.REFRESH = "harvest"
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RESNETS.DEPTH", 34]
    model = build(cfg)
    step(model, batch)
    torch.nn.init.normal_(model.backbone.fpn_output2.weight)
    before = copy.deepcopy(dict(model.named_parameters()))
    stored = model.distiller.reservoir.counts.clone()
    with torch.no_grad():
        losses = step(model, batch)
    assert not any(name.startswith("loss_kd") for name in losses)
    assert all(torch.equal(before[k], v) for k, v in model.named_parameters())
    assert torch.equal(stored, model.distiller.reservoir.counts) and stored.any()


def test_the_distiller_stays_hidden_in_a_wrapper(tiny_cfg):
    wrapped = torch.nn.ModuleDict({"student": build(tiny_cfg("rcnn"))})
    wrapped.load_state_dict(wrapped.state_dict())  # strict


@pytest.mark.faults
def test_heads_that_score_each_class_alone_are_not_compared(tiny_cfg):
    cfg = tiny_cfg("rcnn", "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)
    with pytest.raises(ValueError, match="ResponseKnowledge.*USE_SIGMOID_CE"):
        build(cfg)


@pytest.mark.faults
def test_an_architecture_that_does_not_fit_the_rest_of_the_config_is_named(tiny_cfg):
    cfg = tiny_cfg("rcnn", "MODEL.META_ARCHITECTURE", "DistillRetinaNet")
    with pytest.raises(ValueError, match="no level 'p7'.*RETINANET.IN_FEATURES.*META_ARCHITECTURE"):
        build(cfg)


def test_reliability_is_taken_from_the_nearest_level(tiny_cfg, batch):
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.IN_FEATURES", ["p2", "p5"])
    distiller = build(cfg).distiller
    strides = torch.tensor([4.0, 8.0, 16.0, 32.0, 64.0])
    positives = Positives(
        boxes=torch.zeros(5, 4),
        image_index=torch.zeros(5, dtype=torch.int64),
        classes=torch.zeros(5, dtype=torch.int64),
        gt_boxes=torch.zeros(5, 4),
        strides=strides,
        rows=torch.arange(5),
    )
    context = DistillContext(
        levels=distiller.levels,
        student_maps={},
        teacher_maps={},
        teacher_features={},
        image_sizes=[],
        ground_truth=positives,
        positives=positives,
        candidates=None,
        instances=positives,
        pooler=distiller.pooler,
        teacher=distiller.teacher,
        bank=distiller.bank,
    )
    context.reliability = {p.student: torch.full((5,), float(p.stride)) for p in context.levels}
    assert context.response_reliability.tolist() == [4, 4, 32, 32, 32]


@pytest.mark.faults
def test_two_losses_with_one_term_are_named_at_the_start(tiny_cfg, monkeypatch):
    class Again(FeatureKnowledge):
        pass

    monkeypatch.setitem(DISTILL_LOSS_REGISTRY._obj_map, "Again", Again)
    message = "FeatureKnowledge and Again both return 'loss_kd_feature'"
    with pytest.raises(ValueError, match=message):
        build(tiny_cfg("rcnn", "MODEL.GLOBALKD.LOSSES", ["FeatureKnowledge", "Again"]))


@both
def test_a_compiled_student_makes_its_prototypes(kind, tiny_cfg, batch):
    model = build(tiny_cfg(kind))
    plain = step(copy.deepcopy(model), batch)
    compiled = step(torch.compile(model, backend="eager"), batch)
    for name in TERMS:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-4, atol=1e-6)


def test_the_end_of_the_decay_is_said_once(tiny_cfg, batch, caplog):
    opts = ["MODEL.GLOBALKD.LOSSES", ["FeatureKnowledge"], "SOLVER.MAX_ITER", 2]
    model = build(tiny_cfg("rcnn", *opts, "MODEL.GLOBALKD.RELIABILITY.TYPE", "none"))
    with caplog.at_level("WARNING", logger="globalkd"):
        values = [float(step(model, batch, i)["loss_kd_feature"]) for i in range(4)]
    assert [value > 0 for value in values] == [True, True, False, False]
    assert caplog.text.count("past SOLVER.MAX_ITER (2)") == 1


@pytest.mark.faults
@pytest.mark.parametrize(
    "returned, message",
    [
        (torch.ones(()), r"must return a dict .*\['loss_kd_own'\]; it returned Tensor"),
        ({}, r"must return a dict .*\['loss_kd_own'\]; it returned \[\]"),
        ({"loss_kd_other": torch.ones(())}, r"must .* it returned \['loss_kd_other'\]"),
        ({"loss_kd_own": torch.ones(2)}, r"must return scalar tensors; \['loss_kd_own'\]"),
    ],
)
def test_a_loss_of_ones_own_that_returns_something_else_is_named(
    returned, message, tiny_cfg, batch, monkeypatch
):
    model = build(own_loss("loss_kd_own", returned, tiny_cfg, monkeypatch))
    with pytest.raises(ValueError, match=f"Own.forward {message}"):
        step(model, batch)


@pytest.mark.faults
def test_a_term_with_the_name_of_a_detection_loss_is_refused(tiny_cfg, batch, monkeypatch):
    returned = {"loss_cls": torch.ones(())}
    model = build(own_loss("loss_cls", returned, tiny_cfg, monkeypatch))
    with pytest.raises(ValueError, match=r"Own returns \['loss_cls'\]"):
        step(model, batch)


def own_loss(term, returned, tiny_cfg, monkeypatch):
    class Own(DistillLoss):
        @classmethod
        def from_config(cls, cfg):
            return {}

        def __init__(self, cfg):
            super().__init__({term: 1.0})

        def forward(self, context):
            return returned

    monkeypatch.setitem(DISTILL_LOSS_REGISTRY._obj_map, "Own", Own)
    return tiny_cfg("rcnn", "MODEL.GLOBALKD.LOSSES", ["Own"])


@pytest.mark.faults
@pytest.mark.parametrize("part", ["responses", "predictions", "teacher_dense"])
def test_what_is_read_of_the_teachers_heads_must_be_declared(tiny_cfg, batch, monkeypatch, part):
    cfg = own_loss("loss_kd_own", {}, tiny_cfg, monkeypatch)
    own = DISTILL_LOSS_REGISTRY.get("Own")
    monkeypatch.setattr(own, "forward", lambda _, context: getattr(context, part))
    with pytest.raises(ValueError, match=f"none names it in its `reads`: one of .*'{part}'"):
        step(build(cfg), batch)


@pytest.mark.faults
def test_what_no_context_has_cannot_be_declared(tiny_cfg, monkeypatch):
    cfg = own_loss("loss_kd_own", {}, tiny_cfg, monkeypatch)
    monkeypatch.setattr(DISTILL_LOSS_REGISTRY.get("Own"), "reads", frozenset({"response"}))
    with pytest.raises(ValueError, match=r"Own.reads has \['response'\]; there are .*'responses'"):
        build(cfg)


@pytest.mark.faults
def test_what_is_registered_and_no_loss_is_named(tiny_cfg, monkeypatch):
    monkeypatch.setitem(DISTILL_LOSS_REGISTRY._obj_map, "Wrong", lambda cfg: torch.nn.Identity())
    with pytest.raises(ValueError, match="'Wrong', which gives a Identity and no DistillLoss"):
        build(tiny_cfg("rcnn", "MODEL.GLOBALKD.LOSSES", ["Wrong"]))


class Twice(StandardROIHeads):
    """Samples again, for a head of its own."""

    def forward(self, images, features, proposals, targets=None):
        sampled = self.label_and_sample_proposals(proposals, targets)
        losses = self._forward_box(features, sampled)
        self.label_and_sample_proposals(proposals, targets)
        return sampled, losses


class Shuffled(StandardROIHeads):
    def _forward_box(self, features, proposals):
        shuffled = [x[torch.randperm(len(x))] for x in proposals]
        return super()._forward_box(features, shuffled)


class Subset(StandardROIHeads):
    def _forward_box(self, features, proposals):
        return super()._forward_box(features, [x[: len(x) // 2] for x in proposals])


class PredictsAgain(StandardROIHeads):
    def _forward_box(self, features, proposals):
        losses = super()._forward_box(features, proposals)
        maps = [features[f] for f in self.box_in_features]
        boxes = [x.proposal_boxes for x in proposals]
        self.box_predictor(self.box_head(self.box_pooler(maps, boxes[::-1])))
        return losses


@pytest.mark.parametrize("heads", [StandardROIHeads, Twice, Shuffled, Subset, PredictsAgain])
def test_rows_and_logits_belong_together_in_own_roi_heads(heads, tiny_cfg, batch):
    """A student that is its teacher, to whom nothing is left to say."""
    frozen = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""]
    model = build(tiny_cfg("rcnn", *frozen))
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=3.0)
    equal = build_model(tiny_cfg("rcnn", *frozen, distill=False))
    equal.load_state_dict(model.state_dict())
    teacher = Teacher(equal, input_format=model.input_format)
    model.distiller = Distiller(teacher=teacher, losses=[HintonKD(rows="all")])
    model.distiller.attach(model)
    model.roi_heads.__class__ = heads
    assert step(model, batch)["loss_kd_hinton"].abs() < 1e-6


@pytest.mark.faults
def test_roi_heads_that_score_otherwise_are_named(tiny_cfg, batch):
    model = build(tiny_cfg("rcnn"))

    class OtherHeads(type(model.roi_heads)):
        def _forward_box(self, features, proposals):
            maps = [features[f] for f in self.box_in_features]
            boxes = [x.proposal_boxes for x in proposals]
            scores, _ = self.box_predictor(self.box_head(self.box_pooler(maps, boxes)))
            return {"loss_own": scores.square().mean()}

    model.roi_heads.__class__ = OtherHeads
    with pytest.raises(ValueError, match="OtherHeads cannot be distilled.*box_predictor.losses"):
        step(model, batch)
    del model.roi_heads.box_predictor
    with pytest.raises(ValueError, match="OtherHeads cannot be distilled.*box_predictor.losses"):
        step(model, batch)


@pytest.mark.faults
def test_a_mixin_without_a_detector_of_ours_is_refused(tiny_cfg):
    class Mixed(DistillMixin, GeneralizedRCNN):
        pass

    with pytest.raises(TypeError, match="Mixed cannot be distilled.*DistillGeneralizedRCNN"):
        Mixed(tiny_cfg("rcnn"))


def test_own_subclasses_are_distilled(tiny_cfg, batch):
    class Mine(GeneralizedRCNN):
        def forward(self, batched_inputs):
            losses = super().forward(batched_inputs)
            return {**losses, "loss_mine": losses["loss_cls"] * 2} if self.training else losses

    class MineDistilled(DistillGeneralizedRCNN, Mine):
        pass

    cfg = tiny_cfg("rcnn")
    terms = step(MineDistilled(cfg).train(), batch)
    assert set(terms) > TERMS and terms["loss_mine"] == 2 * terms["loss_cls"]


@pytest.mark.faults
def test_a_teacher_of_another_order_of_classes_is_refused_under_any_trainer(tiny_cfg):
    cfg = tiny_cfg("rcnn")
    register_datasets(cfg)
    teacher = Distiller(cfg).teacher
    teacher.class_names = [str(i) for i in range(10)][::-1]
    with (
        mock.patch("globalkd.distiller.teacher_from_config", lambda _: teacher),
        pytest.raises(ValueError, match="The class lists differ.*ALLOW_OTHER_CLASSES"),
    ):
        build_model(cfg)


def test_a_second_pass_of_the_backbone_is_not_distilled(tiny_cfg, batch, caplog):
    opts = ["MODEL.GLOBALKD.LOSSES", ["FitNet"]]
    torch.manual_seed(0)
    model = build(tiny_cfg("rcnn", *opts))
    expected = step(model, batch)["loss_kd_fitnet"]

    heads, images = model.roi_heads.forward, model.preprocess_image(batch).tensor
    model.roi_heads.forward = lambda *args: (model.backbone(images.flip(3)), heads(*args))[1]
    with caplog.at_level("WARNING"):
        assert step(model, batch)["loss_kd_fitnet"] == expected
    assert "The student's backbone runs several times in a training step" in caplog.text


@pytest.mark.faults
@pytest.mark.parametrize("kind, loss", [("rcnn", "GID"), ("retinanet", "ResponseKnowledge")])
def test_what_compares_anchors_refuses_other_padding(kind, loss, tiny_cfg):
    model = build(tiny_cfg(kind, "MODEL.GLOBALKD.LOSSES", [loss]))
    model.backbone._square_pad = 128
    losses = {loss: model.distiller.losses[loss]}
    with pytest.raises(ValueError, match=rf"\['{loss}'\].*squares of 128 and 0"):
        check_pair(model, model.distiller.teacher, losses, levels=["p3"], num_classes=10)


@pytest.mark.faults
def test_rotated_boxes_are_refused(tiny_cfg):
    model = build(tiny_cfg("rcnn"))
    model.proposal_generator.__class__ = RRPN
    with pytest.raises(ValueError, match="The student detects rotated boxes"):
        check_pair(model, model.distiller.teacher, {}, levels=["p3"], num_classes=10)


def test_a_foreign_architecture_may_take_more_than_the_batch(tiny_cfg, batch):
    class Branched(GeneralizedRCNN):
        def forward(self, batched_inputs, branch):
            assert branch == "supervised"
            return super().forward(batched_inputs)

    class DistillBranched(DistillGeneralizedRCNN, Branched):
        pass

    model = build(tiny_cfg("rcnn"))
    model.__class__ = DistillBranched
    with EventStorage():
        assert set(model(copy.deepcopy(batch), branch="supervised")) >= TERMS
    model.eval()
    assert len(model(copy.deepcopy(batch), branch="supervised")) == len(batch)
