"""CrossKD on real RetinaNets: what goes into the teacher's head, and what comes out."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, make_batch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torchvision.ops import generalized_box_iou
from toy_step import close

from globalkd import add_globalkd_config
from globalkd.dense_head import finish_tower, tower_widths
from globalkd.losses.cross_kd import align_scale, giou_distance, quality_focal_loss


def build(*opts, norm="", kind="retinanet", width=32):
    """A student of 32 channels and a teacher of `width`."""
    cfg = get_cfg()
    add_globalkd_config(cfg)
    base = str(ROOT / f"configs/quick/Base-digits-{kind}.yaml")
    cfg.merge_from_file(base)
    heads = ["MODEL.RETINANET.NUM_CONVS", 4, "MODEL.RETINANET.NORM", norm]
    cfg.merge_from_list([*TINY, *heads])
    cfg.MODEL.META_ARCHITECTURE = (
        "DistillRetinaNet" if kind == "retinanet" else "DistillGeneralizedRCNN"
    )
    cfg.MODEL.GLOBALKD.LOSSES = ["CrossKD"]
    cfg.MODEL.GLOBALKD.TEACHER.CONFIG_FILE = base
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = ["MODEL.FPN.OUT_CHANNELS", width, *heads]
    cfg.merge_from_list(list(opts))
    torch.manual_seed(0)
    return build_model(cfg).train()


def step(model, counts=(4, 2)):
    """The terms of a step, and its context."""
    contexts, gather = [], model.distiller._context

    def record(*args):
        contexts.append(gather(*args))
        return contexts[-1]

    model.distiller._context = record
    torch.manual_seed(1)
    with EventStorage(0):
        terms = model(make_batch(list(counts)))
    del model.distiller._context
    return terms, contexts[0]


@pytest.mark.parametrize("norm", ["", "GN"])
def test_hidden_maps_are_what_the_towers_hold_before_an_activation(norm):
    model = build(norm=norm)
    _, context = step(model)
    teacher = model.distiller.teacher.model
    for detector, maps, dense in (
        (model, context.student_maps, context.student_dense),
        (teacher, context.teacher_maps, context.teacher_dense),
    ):
        layers = 3 if norm else 2  # of a convolution: itself, its norm, its activation
        for tower, number in ((detector.head.cls_subnet, 0), (detector.head.bbox_subnet, 1)):
            for level, hidden in zip(maps.values(), dense.hidden[3]):
                torch.testing.assert_close(hidden[number], tower[: 3 * layers - 1](level))
        for tower, scores, expected in ((0, 10, dense.flat_logits), (1, 4, dense.flat_deltas)):
            outputs = finish_tower(detector.head, [x[tower] for x in dense.hidden[3]], tower, 3)
            assert len(outputs) == len(maps)
            outputs = [x.unflatten(1, (-1, scores)).permute(0, 3, 4, 1, 2) for x in outputs]
            flat = torch.cat([x.flatten(1, 3) for x in outputs], dim=1)
            torch.testing.assert_close(flat, expected)


@pytest.mark.parametrize("width", [32, 64])
def test_the_terms_compare_the_teachers_head_on_both_features(width):
    model = build(width=width)
    adapters = list(model.distiller.losses["CrossKD"].adapters.values())
    terms, context = step(model)
    teacher, total_class, total_box = model.distiller.teacher.model, 0.0, 0.0
    kept = (context.candidates.labels >= 0).view(2, -1)
    assert not kept.all()
    first = 0
    names = list(context.student_dense.logits)
    for level, name in enumerate(names):
        outputs = []
        for number, (tower, last) in enumerate(
            (
                (teacher.head.cls_subnet, teacher.head.cls_score),
                (teacher.head.bbox_subnet, teacher.head.bbox_pred),
            )
        ):
            s, t = (
                x.hidden[3][level][number].detach()
                for x in (context.student_dense, context.teacher_dense)
            )
            if width != 32:
                conv = adapters[number]
                s = torch.einsum("nihw,oi->nohw", s, conv.weight[:, :, 0, 0].detach())
                s = s + conv.bias.detach()[:, None, None]
            aligned = torch.empty_like(s)
            for c in range(width):
                gain = t[:, c].std(correction=0) / s[:, c].std(correction=0).clamp_min(1e-4)
                aligned[:, c] = (s[:, c] - s[:, c].mean()) * gain + t[:, c].mean()
            hidden = F.relu(tower[6](aligned.relu()))  # the fourth convolution
            outputs.append(last(hidden))
        anchors = context.student_dense.anchors[name]
        count = anchors.shape[2]
        logits, deltas = (
            x.unflatten(1, (count, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in outputs
        )
        theirs = context.teacher_dense.logits[name].flatten(1, 3)
        their_deltas = context.teacher_dense.deltas[name].flatten(1, 3)
        flat = anchors.flatten(0, 2)
        for image in range(2):
            mask = kept[image, first : first + len(flat)]
            p, q = theirs[image].sigmoid(), logits[image].sigmoid()
            entropy = -(p * q.log() + (1 - p) * (1 - q).log())
            total_class += float(((q - p).abs() * entropy).sum(1)[mask].sum())
            a, b = (
                context.student_dense.transform.apply_deltas(x[image], flat)
                for x in (deltas, their_deltas)
            )
            giou = generalized_box_iou(a[mask], b[mask]).diagonal()
            total_box += float(((1 - giou) * p.amax(1)[mask]).sum())
        first += len(flat)
    positives = 90 + 0.1 * len(context.positives)
    torch.testing.assert_close(
        terms["loss_kd_cross_class"].detach(),
        torch.tensor(total_class / positives),
        rtol=1e-3,
        atol=1e-6,
    )
    torch.testing.assert_close(
        terms["loss_kd_cross_box"].detach(),
        torch.tensor(total_box / positives),
        rtol=1e-3,
        atol=1e-6,
    )


def test_a_student_with_the_teachers_weights_has_nothing_to_learn(tmp_path):
    weights = str(tmp_path / "same.pth")
    torch.save({"model": build().state_dict()}, weights)
    model = build("MODEL.GLOBALKD.TEACHER.WEIGHTS", weights)
    model.load_state_dict(torch.load(weights)["model"])
    terms, _ = step(model)
    assert terms["loss_kd_cross_class"] < 1e-6 and terms["loss_kd_cross_box"] < 1e-4


def test_gradient_ends_at_the_depth_and_spares_the_teacher():
    model = build("MODEL.GLOBALKD.CROSS_KD.DEPTH", 2)
    terms, _ = step(model)
    (terms["loss_kd_cross_class"] + terms["loss_kd_cross_box"]).backward()
    convolutions = [0, 2, 4, 6]
    for tower in (model.head.cls_subnet, model.head.bbox_subnet):
        reached = [
            tower[i].weight.grad is not None and tower[i].weight.grad.any() for i in convolutions
        ]
        assert reached == [True, True, False, False]
    assert model.head.cls_score.weight.grad is None
    assert next(p for p in model.backbone.parameters() if p.requires_grad).grad.any()
    assert all(p.grad is None for p in model.distiller.teacher.model.parameters())


@pytest.mark.parametrize("norm", ["", "FrozenBN"])  # whose layers have no parameters
def test_adapters_have_the_widths_of_the_towers(norm):
    model = build(norm=norm, width=64)
    adapters = model.distiller.losses["CrossKD"].adapters.values()
    assert [(x.in_channels, x.out_channels) for x in adapters] == [(32, 64)] * 2
    terms, _ = step(model)
    assert all(x.isfinite() for x in terms.values())


@pytest.mark.parametrize("term, other", [("CLASS", "box"), ("BOX", "class")])
def test_one_term_alone_has_its_own_parameters_alone(term, other):
    model = build(f"MODEL.GLOBALKD.CROSS_KD.{other.upper()}_WEIGHT", 0.0, width=64)
    terms, _ = step(model)
    name = f"loss_kd_cross_{term.lower()}"
    assert name in terms and f"loss_kd_cross_{other}" not in terms
    terms[name].backward()
    parameters = list(model.distiller.parameters())
    assert len(parameters) == 2 and all(p.grad.any() for p in parameters)


def test_align_scale_gives_the_teachers_mean_and_deviation():
    s, t = torch.randn(2, 3, 4, 5) * 7 + 2, torch.randn(2, 3, 4, 5)
    s[:, 2] = 1.0  # constant
    aligned = align_scale(s, t)
    for c in range(2):
        close(aligned[:, c].mean(), t[:, c].mean())
        close(aligned[:, c].std(), t[:, c].std())
        order = s[:, c].flatten().argsort()
        assert aligned[:, c].flatten()[order].diff().ge(0).all()
    close(aligned[:, 2], t[:, 2].mean().expand(2, 4, 5))
    torch.testing.assert_close(align_scale(t, t), t)


def test_quality_focal_loss_is_zero_where_both_agree():
    logits = torch.randn(6, 4)
    assert not quality_focal_loss(logits, logits).any()
    p, q = torch.sigmoid(torch.tensor(0.3)), torch.sigmoid(torch.tensor(-1.2))
    expected = (p - q).abs() * -(p * q.log() + (1 - p) * (1 - q).log())
    close(quality_focal_loss(torch.tensor([-1.2]), torch.tensor([0.3])), expected)


def test_giou_distance():
    corners = torch.rand(40, 2, 2) * 10
    a, b = (torch.cat([x, x + torch.rand(40, 2) * 6 + 0.1], dim=1) for x in corners.unbind(1))
    close(giou_distance(a, b), 1 - generalized_box_iou(a, b).diagonal())
    close(giou_distance(a, a), torch.zeros(40))


@pytest.mark.faults
def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="CROSS_KD.DEPTH is 0"):
        build("MODEL.GLOBALKD.CROSS_KD.DEPTH", 0)
    with pytest.raises(
        ValueError, match=r"CrossKD.. read layer 5.*student's have 4 and the teacher's 4"
    ):
        build("MODEL.GLOBALKD.CROSS_KD.DEPTH", 5)
    with pytest.raises(ValueError, match=r"\['CrossKD'\] are defined for one-stage"):
        build(kind="rcnn")


def test_other_heads_have_no_towers():
    assert tower_widths(torch.nn.Conv2d(1, 1, 1)) == []
