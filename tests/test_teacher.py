"""The teacher: the load gate, its channel order, its predictions, and its faster modes."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, ROOT, make_batch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from toy_step import toy_step

from globalkd.data import register_datasets
from globalkd.distiller import Distiller
from globalkd.features import pool, pool_without_waiting, pools_without_waiting
from globalkd.losses import FGFI, FitNet, GlobalKnowledge, ResponseKnowledge
from globalkd.teacher import Teacher
from globalkd.teacher.backbone_pass import is_safe_in_bf16
from globalkd.teacher.building import build_teacher, fold_norms, teacher_config, teacher_from_config
from globalkd.teacher.cutting import cut_backbone

QUICK = str(ROOT / "configs/quick/Base-digits-rcnn.yaml")
SMALL = ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.DEVICE", "cpu"]


def teacher_of(opts=(), config=QUICK):
    return build_teacher(config, "", [*SMALL, *opts], allow_random_weights=True)


@pytest.fixture(scope="module")
def rcnn():
    torch.manual_seed(0)
    return teacher_of()


@pytest.fixture
def stock():
    """The teacher's detector as Detectron2 builds it, with norms that do something."""
    model = build_model(teacher_config(QUICK, SMALL)).eval()
    for name, x in model.named_buffers():
        if "running" in name:
            x.uniform_(0.5, 2.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


@pytest.fixture
def weights(stock, tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save({"model": stock.state_dict()}, path)
    return path


def test_complete_weights_load(stock, weights):
    loaded = build_teacher(QUICK, str(weights), SMALL).model.state_dict()
    kept = {k: v for k, v in stock.state_dict().items() if "bottom_up" not in k}
    assert kept and all(torch.equal(loaded[k], v) for k, v in kept.items())


@torch.no_grad()
def test_folded_norms_leave_the_maps_as_they_are(stock, weights):
    teacher = build_teacher(QUICK, str(weights), SMALL)
    batch = make_batch([2, 1])
    right = stock.backbone(stock.preprocess_image(batch).tensor)
    assert any(isinstance(m, nn.BatchNorm2d) for m in stock.backbone.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in teacher.model.backbone.modules())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    for name, found in teacher.features(batch, teacher.input_format).items():
        torch.testing.assert_close(found, right[name], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN", None])
def test_only_norms_with_fixed_statistics_are_folded(norm, bias):
    conv = Conv2d(3, 32, 3, bias=bias, norm=get_norm(norm or "", 32)).eval()
    for name, x in [*conv.named_parameters(), *conv.named_buffers()]:
        if "norm" in name and x.is_floating_point():
            x.uniform_(0.5, 2.0)
    images = torch.randn(2, 3, 8, 8)
    right = conv(images)
    fold_norms(conv)
    assert (conv.norm is None) == (norm != "GN")
    torch.testing.assert_close(conv(images), right)


def test_a_norm_without_statistics_of_its_own_stays():
    conv = Conv2d(3, 4, 3, norm=nn.BatchNorm2d(4, track_running_stats=False)).eval()
    fold_norms(conv)
    assert isinstance(conv.norm, nn.BatchNorm2d)


@pytest.mark.faults
def test_missing_entries_are_named(stock, weights):
    state = stock.state_dict()
    del state["roi_heads.box_head.fc1.weight"]
    torch.save({"model": state}, weights)
    with pytest.raises(ValueError, match="fills .* Missing.*roi_heads.box_head.fc1.weight"):
        build_teacher(QUICK, str(weights), SMALL)


@pytest.mark.faults
def test_entries_of_another_shape_are_named(weights):
    with pytest.raises(ValueError, match="of another shape: .*fc2"):
        build_teacher(QUICK, str(weights), [*SMALL, "MODEL.ROI_BOX_HEAD.FC_DIM", 48])
    other = [*SMALL, "MODEL.ROI_HEADS.NUM_CLASSES", 3]
    with pytest.raises(ValueError, match=r"shape \(\d+.* in the file and \(\d.*number of classes"):
        build_teacher(QUICK, str(weights), other)


@pytest.mark.faults
def test_no_weights_no_file_no_config():
    with pytest.raises(ValueError, match="TEACHER.WEIGHTS is empty.*ALLOW_RANDOM_WEIGHTS"):
        build_teacher(QUICK, "", SMALL)
    with pytest.raises(FileNotFoundError, match="no file 'nowhere.pth'"):
        build_teacher(QUICK, "nowhere.pth", SMALL)
    with pytest.raises(FileNotFoundError, match="CONFIG_FILE is 'nope.yaml'.*model-zoo name"):
        build_teacher("nope.yaml")
    with pytest.raises(FileNotFoundError, match="CONFIG_FILE is '': neither a file"):
        build_teacher("")


def test_the_teachers_classes_are_those_of_its_own_config(tmp_path, caplog):
    """Its datasets need not be registered, and a name may stand for other data in the student's."""
    classes = [{"id": 7, "name": "pear"}, {"id": 3, "name": "apple"}]
    (tmp_path / "fruit.json").write_text(json.dumps({"categories": classes}))
    fruit = ["fruit", str(tmp_path / "fruit.json"), str(tmp_path)]
    MetadataCatalog.get("fruit").thing_classes = ["other", "data"]

    def names(*opts):
        return teacher_of(["DATASETS.TRAIN", "('fruit',)", *opts]).class_names

    assert names("DATASETS.COCO", str([fruit])) == ["apple", "pear"]
    assert names("DATASETS.VOC", "[['fruit', '/nowhere', 'train', ['a', 'b']]]") == ["a", "b"]
    assert names() == ["other", "data"]
    assert names("DATASETS.COCO", "[['fruit', '/nowhere.json', '/']]") == ["other", "data"]
    assert "not known" not in caplog.text
    MetadataCatalog.remove("fruit")
    assert names() == [] and "names of the teacher's classes are not known" in caplog.text


def test_a_teacher_may_have_the_keys_of_another_project(tmp_path):
    path = tmp_path / "teacher.yaml"
    path.write_text(f"_BASE_: {QUICK}\nMODEL: {{MYPROJECT: {{WIDTH: 2.0}}}}\nOTHER: 3")
    with pytest.raises(ValueError, match="no key (MODEL.MYPROJECT|OTHER)"):
        teacher_config(str(path))
    like = get_cfg()
    like.MODEL.MYPROJECT = CfgNode({"WIDTH": 1.0, "DEPTH": 7})
    like.OTHER, like.MODEL.RESNETS.DEPTH = 1, 101
    cfg = teacher_config(str(path), like=like)
    assert (cfg.MODEL.MYPROJECT.WIDTH, cfg.MODEL.MYPROJECT.DEPTH, cfg.OTHER) == (2.0, 7, 3)
    assert cfg.MODEL.RESNETS.DEPTH != 101 and like.MODEL.MYPROJECT.WIDTH == 1.0


def test_zoo_names_are_configs():
    cfg = teacher_config("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml")
    assert cfg.MODEL.RESNETS.DEPTH == 101


def test_channel_order_follows_the_teacher(rcnn):
    batch = make_batch([1, 1])
    flipped = [{**x, "image": x["image"].flip(0)} for x in batch]
    as_bgr, as_rgb = rcnn.features(batch, "BGR"), rcnn.features(flipped, "RGB")
    assert all(torch.equal(as_bgr[k], as_rgb[k]) for k in as_bgr)


def box_logits(teacher, features, boxes, sizes):
    """Logits of lists of boxes, one for each image."""
    image = torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)])
    return teacher.box_logits(features, torch.cat(boxes), image, sizes)


def _inference_scores(model, batch, boxes):
    """What the detector itself predicts for given boxes, by its own inference path."""
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    proposals = [Instances(s, proposal_boxes=Boxes(b)) for s, b in zip(images.image_sizes, boxes)]
    heads = model.roi_heads
    maps = [features[f] for f in heads.box_in_features]
    pooled = heads.box_head(heads.box_pooler(maps, [p.proposal_boxes for p in proposals]))
    scores = heads.box_predictor.predict_probs(heads.box_predictor(pooled), proposals)
    return torch.cat(list(scores))


def test_box_logits_are_the_detectors_own(rcnn):
    batch = make_batch([3, 2])
    boxes = [x["instances"].gt_boxes.tensor for x in batch]
    sizes = [x["image"].shape[-2:] for x in batch]
    logits = box_logits(rcnn, rcnn.features(batch, "BGR"), boxes, sizes)
    with torch.no_grad():
        torch.testing.assert_close(logits.softmax(1), _inference_scores(rcnn.model, batch, boxes))


@pytest.mark.parametrize("kind", ["ROIAlignV2", "ROIAlign"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_pooling_without_waiting_is_the_poolers(kind, sampling_ratio):
    torch.manual_seed(0)
    pooler = ROIPooler(
        3,
        scales=[1 / 4, 1 / 8, 1 / 16],
        sampling_ratio=sampling_ratio,
        pooler_type=kind,
        canonical_box_size=32,
        canonical_level=3,
    )
    assert pools_without_waiting(pooler)
    maps = [torch.randn(2, 5, n, n, requires_grad=True) for n in (16, 8, 4)]
    sides = torch.tensor([[4.0, 4], [20, 30], [60, 60], [9, 50]])
    boxes = [torch.cat([b, b + sides], dim=1) for b in torch.rand(2, 4, 2) * 10]
    rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])
    expected = pooler(maps, [Boxes(b) for b in boxes])
    torch.testing.assert_close(pool(pooler, maps, rois), expected)
    found = pool_without_waiting(pooler, maps, rois)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(x.square().sum(), maps) for x in (found, expected))
    torch.testing.assert_close(*gradients)
    assert pool_without_waiting(pooler, maps, rois[:0]).shape == (0, 5, 3, 3)
    with_pooling = ROIPooler(3, scales=[1 / 4], sampling_ratio=0, pooler_type="ROIPool")
    assert not pools_without_waiting(with_pooling)


def test_cascade_logits_are_the_mean_of_the_stages(monkeypatch):
    cascade = teacher_of(
        [
            "MODEL.ROI_HEADS.NAME",
            "CascadeROIHeads",
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
            True,
        ]
    )
    batch = make_batch([3, 2])
    boxes = [x["instances"].gt_boxes.tensor for x in batch]
    features = cascade.features(batch, "BGR")
    logits = box_logits(cascade, features, boxes, [(64, 64)] * 2)
    seen = {}
    from detectron2.modeling.roi_heads import cascade_rcnn

    def inference(boxes, scores, *args):
        seen["scores"] = torch.cat(list(scores))
        return [Instances((64, 64))] * 2, None

    monkeypatch.setattr(cascade_rcnn, "fast_rcnn_inference", inference)
    proposals = [Instances((64, 64), proposal_boxes=Boxes(b)) for b in boxes]
    with torch.no_grad():
        cascade.model.roi_heads._forward_box(features, proposals)
    torch.testing.assert_close(logits.softmax(1), seen["scores"])


def test_no_boxes_give_no_logits(rcnn):
    batch = make_batch([0, 0])
    logits = box_logits(rcnn, rcnn.features(batch, "BGR"), [torch.zeros(0, 4)] * 2, [(64, 64)] * 2)
    assert logits.shape == (0, 11)


def test_dense_logits_are_ordered_like_the_anchors():
    config = str(ROOT / "configs/quick/Base-digits-retinanet.yaml")
    teacher = build_teacher(config, "", SMALL[:2] + SMALL[4:], allow_random_weights=True)
    features = teacher.features(make_batch([1, 1]), "BGR")
    model = teacher.model
    anchors = model.anchor_generator([features[f] for f in model.head_in_features])
    logits = teacher.dense_outputs(features, anchors).flat_logits
    assert logits.shape == (2, sum(len(a) for a in anchors), 10)
    with pytest.raises(AssertionError, match="padded to different sizes"):
        teacher.dense_outputs(features, [Boxes(a.tensor[:-3]) for a in anchors])


@pytest.mark.parametrize("count", [0, 1, 40])
def test_logits_at_some_rows_are_those_of_all(count):
    context = toy_step()
    dense = context.student_dense
    num_rows = len(context.candidates.labels)
    rows = torch.randint(0, num_rows, (count,), generator=torch.Generator().manual_seed(count))
    if count > 2:
        rows[:3] = torch.tensor([0, num_rows - 1, num_rows - 1])  # a row may stand twice
    results = []
    for logits in (dense.logits_at(rows), dense.flat_logits.flatten(0, 1)[rows]):
        gradients = torch.autograd.grad(logits.square().sum(), list(dense.logits.values()))
        results.append([logits, *gradients])
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)


def test_the_teacher_is_frozen_whatever_it_was():
    cfg = teacher_config(QUICK, SMALL)
    model = build_model(cfg).train()
    teacher = Teacher(model, input_format="BGR")
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert teacher.num_classes == 10


def planted(teacher, **modes):
    """The same detector, run in another way."""
    return Teacher(teacher.model, input_format=teacher.input_format, **modes)


CUT = {  # opts -> the levels that are read, how many convolutions that saves
    "finest unread": ([], ["p4", "p5", "p6"], 4),  # output and lateral of p2 and p3
    "coarsest unread": ([], ["p2", "p3"], 2),
    "top block alone": ([], ["p6"], 6),  # made of p5
    "all": ([], ["p2", "p3", "p4", "p5", "p6"], 0),
    "resnet": (
        [
            *("MODEL.BACKBONE.NAME", "build_resnet_backbone"),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[32]]),
        ],
        ["res2", "res3"],
        10,  # of res4 and res5: two blocks of two each, and their shortcuts
    ),
}


@pytest.mark.parametrize("opts, levels, saved", CUT.values(), ids=CUT)
def test_unread_levels_cost_nothing_and_the_others_are_the_same(opts, levels, saved):
    teacher, batch = teacher_of(opts), make_batch([1, 1])
    count = []
    for module in teacher.model.backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: count.append(1))
    everything, before = teacher.features(batch, "BGR"), len(count)
    teacher.read_levels(levels)
    count.clear()
    found = teacher.features(batch, "BGR")
    assert list(found) == levels and before - len(count) == saved
    assert all(torch.equal(found[name], everything[name]) for name in levels)
    # The detector itself is whole.
    whole = teacher.model.backbone(teacher.model.preprocess_image(batch).tensor)
    assert list(whole) == list(everything)


def test_a_cut_backbone_moves_with_its_teacher():
    teacher = teacher_of()
    teacher.read_levels(["p3"])
    teacher.apply_(lambda x: x.double() if x.is_floating_point() else x)
    images = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    assert teacher._backbone(images)["p3"].dtype == torch.float64


def test_a_pyramid_of_another_kind_stays_whole(rcnn):
    class PathAggregation(FPN):
        """A bottom-up path after the pyramid's own: coarser levels need finer ones."""

    backbone = copy.copy(rcnn.model.backbone)
    backbone.__class__ = PathAggregation
    assert cut_backbone(backbone, ["p4"]) is backbone


@pytest.mark.faults
def test_a_level_that_is_not_there_is_named(rcnn):
    with pytest.raises(ValueError, match="no level \\['p9'\\].*'p2'"):
        rcnn.read_levels(["p9", "p2"])


@pytest.mark.parametrize("loss", ["FeatureKnowledge", "ResponseKnowledge"])
def test_levels_are_left_out_where_no_head_reads_them(loss, tiny_cfg):
    cfg = tiny_cfg("rcnn")
    cfg.MODEL.GLOBALKD.LOSSES = [loss]
    cfg.MODEL.GLOBALKD.IN_FEATURES = ["p3", "p4"]
    teacher = build_model(cfg).distiller.teacher
    found = teacher.features(make_batch([1]), "BGR")
    assert list(found) == (
        ["p3", "p4"] if loss == "FeatureKnowledge" else list(teacher.output_shape)
    )


def test_a_teacher_of_two_distillers_is_whole_again_for_heads(tiny_cfg):
    cfg = tiny_cfg("rcnn")
    cfg.MODEL.GLOBALKD.LOSSES = ["FeatureKnowledge"]
    cfg.MODEL.GLOBALKD.IN_FEATURES = ["p3"]
    student = build_model(cfg)
    teacher = student.distiller.teacher
    assert list(teacher.features(make_batch([1]), "BGR")) == ["p3"]
    again = Distiller(teacher=teacher, losses=[ResponseKnowledge(use_reliability=False)])
    again.attach(student)
    assert list(teacher.features(make_batch([1]), "BGR")) == list(teacher.output_shape)


def test_a_student_in_another_order_of_channels_is_read_in_its_own(tiny_cfg):
    """Whatever a Distiller that was built by hand is told; it is told nothing."""
    student = build_model(tiny_cfg("rcnn"))
    student.input_format = "RGB"
    model = build_model(tiny_cfg("rcnn", distill=False))
    distiller = Distiller(teacher=Teacher(model, input_format="RGB"), losses=[FitNet()])
    distiller.attach(student)
    batch, seen = make_batch([1]), []
    preprocess = model.preprocess_image
    model.preprocess_image = lambda inputs: seen.append(inputs) or preprocess(inputs)
    distiller.begin(batch)()
    assert torch.equal(seen[0][0]["image"], batch[0]["image"])
    student.input_format = "BGR"
    distiller.attach(student)
    distiller.begin(batch)()
    assert torch.equal(seen[1][0]["image"], batch[0]["image"].flip(0))


@pytest.mark.faults
def test_a_detector_is_no_teacher_yet(tiny_cfg):
    with pytest.raises(TypeError, match="`teacher` is a GeneralizedRCNN"):
        Distiller(teacher=build_model(tiny_cfg("rcnn", distill=False)), losses=[FitNet()])


@pytest.mark.faults
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_backbone_that_cuts_images_off_is_refused(tiny_cfg, who):
    model = build_model(tiny_cfg("rcnn", "MODEL.GLOBALKD.LOSSES", ["FitNet"]))
    detector = model if who == "student" else model.distiller.teacher.model
    detector.backbone._square_pad = 64
    with EventStorage(0), pytest.raises(ValueError, match=f"The {who}'s map.*square_pad"):
        model(make_batch([1], size=128))


@pytest.mark.faults
def test_losses_that_read_prototypes_need_what_makes_them(tiny_cfg):
    student = build_model(tiny_cfg("rcnn"))
    teacher = student.distiller.teacher
    distiller = Distiller(teacher=teacher, losses=[GlobalKnowledge(), FitNet(), FGFI()])
    with pytest.raises(ValueError, match=r"\['GlobalKnowledge'\] read prototypes.*`refresher`"):
        distiller.attach(student)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_of_its_own_returns_float32_near_the_exact_maps(precision, rcnn):
    batch = make_batch([3, 2], size=128)
    boxes = [x["instances"].gt_boxes.tensor for x in batch]
    fast = planted(rcnn, precision=precision)
    exact, found = rcnn.features(batch, "BGR"), fast.features(batch, "BGR")
    for name, x in exact.items():
        assert found[name].dtype == torch.float32 and not torch.equal(found[name], x)
        assert (found[name] - x).norm() < 0.05 * x.norm(), name
    logits = box_logits(fast, found, boxes, [(128, 128)] * 2)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(
        logits, box_logits(rcnn, exact, boxes, [(128, 128)] * 2), rtol=0, atol=0.1
    )


def test_bf16_leaves_narrow_images_in_float32_on_a_cpu(rcnn, caplog):
    """PyTorch's bf16 convolutions read memory that nothing wrote where maps have two columns."""
    batch = make_batch([1], size=64)
    expected = rcnn.features(batch, "BGR")
    found = planted(rcnn, precision="bf16").features(batch, "BGR")
    assert all(torch.equal(found[n], x) for n, x in expected.items())
    with torch.autocast("cpu", torch.bfloat16):  # as the student's may be
        found = planted(rcnn, precision="bf16").features(batch, "BGR")
    assert all(torch.equal(found[n], x) for n, x in expected.items())
    assert not is_safe_in_bf16(torch.zeros(1, 3, 512, 128), 128)
    assert is_safe_in_bf16(torch.zeros(1, 3, 128, 160), 128)
    assert is_safe_in_bf16(torch.zeros(1, 3, 64, 64, device="meta"), 128)  # another device


def test_by_default_the_teacher_follows_the_students_precision(rcnn):
    batch = make_batch([1])
    plain = rcnn.features(batch, "BGR")
    with torch.autocast("cpu", torch.bfloat16):
        mixed, exact = rcnn.features(batch, "BGR"), planted(rcnn, precision="fp32")
        exact = exact.features(batch, "BGR")
    assert mixed["p2"].dtype == torch.bfloat16
    assert all(torch.equal(exact[name], x) for name, x in plain.items())


def test_compile_runs_the_compiled_backbone(rcnn, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda module: lambda x: seen.append(1) or module(x))
    batch = make_batch([1])
    maps = planted(rcnn, compile=True).features(batch, "BGR")
    assert seen and all(torch.equal(maps[k], x) for k, x in rcnn.features(batch, "BGR").items())


def test_a_rescaled_input_gives_what_the_teacher_says_of_smaller_images(rcnn):
    batch = make_batch([3, 2])
    boxes = [x["instances"].gt_boxes.tensor for x in batch]
    half = planted(rcnn, input_scale=0.5)
    small = [
        {
            "image": F.interpolate(
                x["image"][None].float(), size=32, mode="bilinear", antialias=True
            )[0]
        }
        for x in batch
    ]
    maps, expected = half.features(batch, "BGR"), rcnn.features(small, "BGR")
    for name, x in expected.items():
        torch.testing.assert_close(maps[name], x)
    torch.testing.assert_close(
        box_logits(half, maps, boxes, [(64, 64)] * 2),
        box_logits(rcnn, expected, [b / 2 for b in boxes], [(32, 32)] * 2),
    )


@pytest.mark.parametrize("scale", [0.5, 0.75, 2.0])
def test_rescaled_maps_come_back_to_their_place(scale, rcnn):
    teacher = planted(rcnn, input_scale=scale)
    cells = round(16 * scale)
    centres = (torch.arange(cells) + 0.5) / scale  # in cells of the unscaled input
    ramp = centres.expand(1, 1, cells, cells)
    restored = teacher.on_input_grid({"p2": ramp})["p2"]
    assert restored.shape[-2:] == (16, 16)
    expected = (torch.arange(16) + 0.5).expand(1, 1, 16, 16)
    torch.testing.assert_close(restored[..., 2:-2], expected[..., 2:-2])


@pytest.mark.faults
@pytest.mark.parametrize("mode", [{"precision": "int8"}, {"input_scale": 0.0}])
def test_unknown_modes_name_the_key(mode, rcnn):
    with pytest.raises(ValueError, match=f"TEACHER.{next(iter(mode)).upper()} is "):
        planted(rcnn, **mode)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("scale", [0.5, 0.75])
def test_losses_run_on_a_teacher_of_another_input_size(kind, scale, tiny_cfg, batch):
    losses = ["GlobalKnowledge", "FeatureKnowledge", "InstanceRelation", "FGFI", "FBKD"]
    if kind == "rcnn":
        losses.append("ResponseKnowledge")
    cfg = tiny_cfg(
        kind, "MODEL.GLOBALKD.LOSSES", losses, "MODEL.GLOBALKD.TEACHER.INPUT_SCALE", scale
    )
    register_datasets(cfg)
    model = build_model(cfg).train()
    with EventStorage(0):
        terms = {k: v for k, v in model(batch).items() if k.startswith("loss_kd")}
    assert len(terms) > len(losses) and all(x.isfinite() and x > 0 for x in terms.values())


@pytest.mark.parametrize(
    "scale, trained_at, suggested",
    [
        (1.0, (64,), None),
        (1.0, (72, 128), None),  # one of its sizes is nearly as small
        (1.0, (128,), "INPUT_SCALE 2,"),
        (2.0, (128,), None),
        (2.0, (64,), "INPUT_SCALE 1,"),
        (0.5, (64, 128), "INPUT_SCALE 1.5,"),
        (0.5, (0,), None),  # images as they are
    ],
)
def test_a_teacher_at_another_size_than_its_own_is_warned_of(
    scale, trained_at, suggested, tiny_cfg, caplog
):
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.TEACHER.INPUT_SCALE", scale)
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.MODEL.GLOBALKD.TEACHER.OPTS += ["INPUT.MIN_SIZE_TRAIN", trained_at]
    teacher_from_config(cfg)
    warned = [x for x in caplog.messages if "short side" in x]
    assert len(warned) == bool(suggested) and all(suggested in x for x in warned)


@pytest.mark.faults
@pytest.mark.parametrize("kind, loss", [("rcnn", "GID"), ("retinanet", "ResponseKnowledge")])
def test_what_compares_anchors_refuses_another_input_size(kind, loss, tiny_cfg):
    options = ["MODEL.GLOBALKD.LOSSES", [loss], "MODEL.GLOBALKD.TEACHER.INPUT_SCALE", 0.5]
    with pytest.raises(ValueError, match=rf"\['{loss}'\].*INPUT_SCALE = 0.5"):
        build_model(tiny_cfg(kind, *options))


@pytest.mark.faults
def test_weights_of_a_deeper_backbone_are_refused(tmp_path):
    """Each entry of R18 is in R34, too, and yet it is another detector."""
    deep, path = [*SMALL, "MODEL.RESNETS.DEPTH", 34], str(tmp_path / "deep.pth")
    torch.save({"model": build_model(teacher_config(QUICK, deep)).state_dict()}, path)
    with pytest.raises(ValueError, match="entries of a backbone .*such as backbone.bottom_up.res"):
        build_teacher(QUICK, path, SMALL)
    build_teacher(QUICK, path, SMALL, allow_random_weights=True)
    build_teacher(QUICK, path, deep)


@pytest.mark.faults
def test_what_is_no_detector_is_no_teacher(rcnn):
    with pytest.raises(ValueError, match="of a Linear, which has no backbone"):
        Teacher(nn.Linear(2, 2), input_format="BGR")
    segmentor = copy.copy(rcnn.model)
    segmentor._modules = {k: v for k, v in segmentor._modules.items() if k != "roi_heads"}
    teacher = Teacher(segmentor, input_format="BGR")
    with pytest.raises(ValueError, match="of a GeneralizedRCNN, which scores no classes"):
        _ = teacher.num_classes


@pytest.mark.faults
def test_a_lazyconfig_teacher_is_told_to_be_one():
    name = "new_baselines/mask_rcnn_R_101_FPN_100ep_LSJ.py"
    with pytest.raises(ValueError, match="LSJ.py', a LazyConfig; .* needs a YAML file"):
        teacher_config(name)


@pytest.mark.faults
def test_a_mistake_in_the_teachers_options_names_them():
    with pytest.raises(ValueError, match="TEACHER.OPTS: there is no key MODEL.FPN.OUT_CHANNEL"):
        teacher_config(QUICK, ["MODEL.FPN.OUT_CHANNEL", 3])


@pytest.mark.faults
def test_only_rgb_and_bgr_are_turned_into_each_other(tiny_cfg):
    cfg = tiny_cfg("rcnn")
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = [*cfg.MODEL.GLOBALKD.TEACHER.OPTS, "INPUT.FORMAT", "GBR"]
    with pytest.raises(ValueError, match="FORMAT is 'BGR' and the teacher's 'GBR'"):
        build_model(cfg)
