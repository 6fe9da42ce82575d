"""A teacher that knows more classes than the student: TEACHER.CLASSES."""

import copy
import warnings

import pytest
import torch
from conftest import make_batch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from globalkd.data import register_datasets
from globalkd.data.config_checks import check_classes
from globalkd.teacher import Teacher
from globalkd.teacher.classes import SelectedClasses, select_classes

NAMES = [f"c{k}" for k in range(10)]
CHOSEN = [7, 2, 5]
BACKGROUND = -1
MASKS = ["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
         "MODEL.ROI_MASK_HEAD.NUM_CONV", 1]  # fmt: skip
CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads",
           "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]  # fmt: skip
C4 = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.ROI_HEADS.NAME", "Res5ROIHeads",
      "MODEL.RESNETS.OUT_FEATURES", ["res4"], "MODEL.RPN.IN_FEATURES", ["res4"],
      "MODEL.ROI_HEADS.IN_FEATURES", ["res4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32]],
      "MODEL.ROI_BOX_HEAD.NAME", "", "MODEL.RESNETS.DEPTH", 50]  # fmt: skip
HEADS = {
    "boxes of classes": ("rcnn", []),
    "boxes of any class": ("rcnn", ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]),
    "masks": ("rcnn", MASKS),
    "cascade": ("rcnn", CASCADE),
    "C4": ("rcnn", C4),
    "retinanet": ("retinanet", []),
}
each_head = pytest.mark.parametrize("kind, opts", HEADS.values(), ids=HEADS)


@pytest.fixture
def detector(tiny_cfg):
    """Builds a detector of ten classes whose class scores and boxes differ much."""

    def build(kind, opts=()):
        torch.manual_seed(0)
        model = build_model(tiny_cfg(kind, *opts, distill=False)).eval()
        spread = 1 if "Res5ROIHeads" in opts else 8  # the features of a C4 head are large
        for name, x in model.named_parameters():
            if "cls_score" in name or "bbox_pred" in name or "mask_head.predictor" in name:
                nn.init.normal_(x, std=(spread if "cls" in name else 1) / max(x[0].numel(), 16))
        return model

    return build


def teachers(model):
    """The same detector as a teacher of all and of the chosen classes."""
    whole = Teacher(copy.deepcopy(model), input_format="BGR", class_names=NAMES)
    return whole, Teacher(model, input_format="BGR", class_names=NAMES, classes=CHOSEN)


def test_names_and_their_number_are_those_of_the_chosen(detector):
    for classes in (CHOSEN, ["c7", "c2", "c5"], ["c7", 2, "c5"]):
        teacher = Teacher(detector("rcnn"), input_format="BGR", class_names=NAMES, classes=classes)
        assert teacher.num_classes == 3 and teacher.class_names == ["c7", "c2", "c5"]
    unnamed = Teacher(detector("rcnn"), input_format="BGR", classes=CHOSEN)
    assert unnamed.num_classes == 3 and unnamed.class_names == []


@pytest.mark.parametrize("name", ["boxes of classes", "cascade", "C4"])
def test_a_box_head_gives_the_probabilities_as_before_and_the_rest_to_the_background(
    detector, name
):
    whole, chosen = teachers(detector(*HEADS[name]))
    batch = make_batch([3, 2])
    boxes = torch.cat([x["instances"].gt_boxes.tensor for x in batch])
    image = torch.tensor([0, 0, 0, 1, 1])
    features = whole.features(batch, "BGR")
    all_classes, found = (
        teacher.box_logits(features, boxes, image, [(64, 64)] * 2).softmax(dim=1)
        for teacher in (whole, chosen)
    )
    assert found.shape == (5, 4) and all_classes[:, CHOSEN].min() > 1e-6
    torch.testing.assert_close(found[:, :BACKGROUND], all_classes[:, CHOSEN])
    torch.testing.assert_close(found[:, BACKGROUND], 1 - all_classes[:, CHOSEN].sum(dim=1))


@pytest.mark.parametrize("rows", [[], [0, 5, 600]])
def test_a_dense_head_gives_the_scores_as_before(detector, rows):
    whole, chosen = teachers(detector("retinanet"))
    features = whole.features(make_batch([1, 1]), "BGR")
    head = whole.model
    anchors = head.anchor_generator([features[f] for f in head.head_in_features])
    all_classes, found = (t.dense_outputs(features, anchors).flat_logits for t in (whole, chosen))
    torch.testing.assert_close(found, all_classes[..., CHOSEN])
    rows = torch.tensor(rows, dtype=torch.int64)
    some = chosen.anchor_logits(features, rows, found.shape[0] * found.shape[1])
    torch.testing.assert_close(some, found.flatten(0, 1)[rows], rtol=1e-4, atol=1e-4)


@each_head
@torch.no_grad()
def test_its_detections_are_those_of_the_chosen_classes(detector, kind, opts):
    """Boxes and masks, too: what an evaluation of the teacher sees."""
    limits = [
        "TEST.DETECTIONS_PER_IMAGE", 100000,  # a limit for all classes together
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST", 100000,
        "MODEL.RETINANET.SCORE_THRESH_TEST", 0.05, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.05,
    ]  # fmt: skip
    whole, chosen = teachers(detector(kind, [*limits, *opts]))
    batch = make_batch([2, 2])
    everything, found = (teacher.model(batch) for teacher in (whole, chosen))
    seen = 0
    for all_of_image, of_image in zip(everything, found):
        all_of_image, of_image = all_of_image["instances"], of_image["instances"]
        for new, old in enumerate(CHOSEN):
            right = all_of_image[all_of_image.pred_classes == old]
            here = of_image[of_image.pred_classes == new]
            seen += len(right)
            assert len(here) == len(right)
            for field in set(right.get_fields()) - {"pred_classes", "pred_boxes"}:
                torch.testing.assert_close(here.get(field), right.get(field), msg=field)
            torch.testing.assert_close(here.pred_boxes.tensor, right.pred_boxes.tensor)
    assert seen > 0


def test_all_classes_in_another_order_leave_the_background_as_it_is(detector):
    layer = nn.Linear(4, 11)
    x, order = torch.randn(6, 4), list(range(10))[::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's, of tensors without elements
        found = SelectedClasses(layer, order)(x)
    torch.testing.assert_close(found, layer(x)[:, [*order, 10]])


def test_large_scores_in_half_precision_do_not_overflow():
    layer = nn.Linear(4, 11)
    nn.init.constant_(layer.bias, 60000.0)
    found = SelectedClasses(layer.half(), CHOSEN)(torch.zeros(2, 4).half())
    assert found.dtype == torch.float16 and found.isfinite().all()


def test_a_student_inherits_the_rows_of_its_classes(tiny_cfg):
    cfg = tiny_cfg("rcnn", "MODEL.ROI_HEADS.NUM_CLASSES", 3)
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = [
        *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32),
        *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3),
    ]
    cfg.MODEL.GLOBALKD.TEACHER.CLASSES = CHOSEN
    cfg.MODEL.GLOBALKD.INHERIT_TEACHER_HEADS = True
    student = build_model(cfg)
    names = student.distiller.start(student)
    assert any("bbox_pred" in name for name in names)
    ours, theirs = (
        model.roi_heads.box_predictor.cls_score.weight
        for model in (student, student.distiller.teacher.model)
    )
    assert len(ours) == 4 and torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
def test_a_step_with_a_teacher_of_more_classes(tiny_cfg, kind):
    key = "MODEL.ROI_HEADS.NUM_CLASSES" if kind == "rcnn" else "MODEL.RETINANET.NUM_CLASSES"
    cfg = tiny_cfg(kind, key, 3, "MODEL.GLOBALKD.LOSSES", ["ResponseKnowledge"])
    cfg.MODEL.GLOBALKD.RESPONSE.USE_RELIABILITY = False
    opts = [*cfg.MODEL.GLOBALKD.TEACHER.OPTS, key, 10]
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = opts
    with pytest.raises(ValueError, match="name the student's in MODEL.GLOBALKD.TEACHER.CLASSES"):
        build_model(cfg)
    cfg.MODEL.GLOBALKD.TEACHER.CLASSES = CHOSEN
    model = build_model(cfg).train()
    batch = make_batch([4, 0])
    for x in batch:
        x["instances"].gt_classes %= 3
    with EventStorage():
        losses = model(batch)
    assert losses["loss_kd_response"] > 0
    sum(losses.values()).backward()


@pytest.mark.faults
@pytest.mark.parametrize(
    "classes, names, problem",
    [
        (["c3", "dog"], NAMES, r"\['dog'\], which the teacher does not know; its classes are c0,"),
        (["c3"], [], r"\['c3'\].*names of its classes are not known here: give their labels"),
        ([3, 10], NAMES, r"CLASSES has \[10\]; the teacher's labels are whole numbers from 0 to 9"),
        ([-1], NAMES, r"CLASSES has \[-1\]"),
        ([1.0], NAMES, r"CLASSES has \[1.0\]"),
        (["c3", 3], NAMES, r"a class more than once: \['c3', 3\]"),
    ],
)
def test_classes_that_it_has_not_are_named(detector, classes, names, problem):
    with pytest.raises(ValueError, match=problem):
        Teacher(detector("rcnn"), input_format="BGR", class_names=names, classes=classes)


@pytest.mark.faults
def test_heads_of_another_kind_are_refused(detector):
    model = detector("rcnn")
    model.roi_heads.box_predictor = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="TEACHER.CLASSES needs heads of .*has .*Linear"):
        select_classes(model, CHOSEN, NAMES)
    with pytest.raises(ValueError, match="TEACHER.CLASSES needs heads of .*has Identity"):
        select_classes(nn.Identity(), CHOSEN, NAMES)  # scores no classes at all


@pytest.mark.faults
def test_a_teacher_that_knows_the_classes_of_the_data_is_told_by_the_error(tiny_cfg, catalogs):
    cfg = tiny_cfg("rcnn")
    register_datasets(cfg)
    data = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
    remedy = rf"set MODEL.GLOBALKD.TEACHER.CLASSES to \['{data[0]}', '{data[1]}', "
    with pytest.raises(ValueError, match=remedy):
        check_classes(cfg, ["other", *data])
    check_classes(cfg, data)
