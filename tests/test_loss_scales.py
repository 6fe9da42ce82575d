"""tools/loss_scales.py: shares are those of gradients taken one by one."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from globalkd.checks.terms import LATE
from globalkd.data import register_datasets

sys.path.insert(0, str(ROOT / "tools"))
from loss_scales import build, load, measure, table

NAMES = ["FitNet", "HintonKD", "ICD"]


@pytest.fixture
def model(tiny_cfg):
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.LOSSES", NAMES, "MODEL.GLOBALKD.ICD.HIDDEN_DIM", 16)
    cfg.MODEL.GLOBALKD.DECAY = "none"
    register_datasets(cfg)
    torch.manual_seed(0)
    return build_model(cfg).train()


def backbone_gradient(model, batch, chosen):
    """Value of the chosen terms and norm of their gradient, by a backward pass of their own."""
    torch.manual_seed(1)
    with EventStorage(LATE):
        terms = model(batch)
    value = sum(x for name, x in terms.items() if chosen(name))
    model.zero_grad()
    value.backward()
    gradients = [p.grad.flatten() for p in model.backbone.parameters() if p.grad is not None]
    return value.item(), torch.cat(gradients).norm().item()


def test_shares_are_those_of_gradients_taken_one_by_one(model, batch):
    torch.manual_seed(1)
    measured = measure(model, batch)
    whole = backbone_gradient(model, batch, lambda name: "kd" not in name)
    parts = {
        ("FitNet", "", ""): "fitnet",
        ("HintonKD", "", ""): "hinton",
        ("ICD", "", ""): "icd",  # from the first iteration on, whatever START_ITER says
        ("all together", "", ""): "kd",
    }
    for row, part in parts.items():
        alone = backbone_gradient(model, batch, lambda name, part=part: f"_{part}" in name)
        assert measured[row] == pytest.approx([a / b for a, b in zip(alone, whole)], rel=1e-3)
        assert measured[row][1] > 0


def test_of_a_term_they_are_per_unit_of_weight(model, batch):
    shares = []
    for weight, of_all in ((1.0, 1.0), (2.0, 2.0)):
        model.distiller.losses["FitNet"].weights["loss_kd_fitnet"] = weight
        model.distiller.schedule = replace(model.distiller.schedule, weight=of_all)
        torch.manual_seed(1)
        measured = measure(model, batch)
        term = measured["FitNet", "loss_kd_fitnet", weight * of_all]
        shares.append((measured["FitNet", "", ""], term))
    (loss, term), (stronger_loss, stronger_term) = shares
    assert stronger_loss == pytest.approx([4 * x for x in loss], rel=1e-3)
    assert stronger_term == pytest.approx(term, rel=1e-3)
    assert "| `loss_kd_fitnet` | 4 |" in table([measured, measured])


def test_the_course_of_the_weights_over_training_is_left_out(model, batch):
    plain = model.distiller.schedule
    courses = [plain, replace(plain, decay="linear", warmup_iters=50, stop_iter=9)]
    measured = []
    for model.distiller.schedule in courses:
        torch.manual_seed(1)
        measured.append(measure(model, batch))
    assert measured[0] == {k: pytest.approx(v, rel=1e-3) for k, v in measured[1].items()}


def test_every_loss_that_the_student_can_have():
    rcnn, retinanet = (
        load(str(ROOT / f"configs/quick/{name}.yaml"), [], every_loss=True).MODEL.GLOBALKD
        for name in ("gkd_R34_R18", "gkd_retinanet_R34_R18")
    )
    assert set(retinanet.LOSSES) - set(rcnn.LOSSES) == {
        "CrossKD",
        "PredictionGuidedImitation",
        "RankMimicking",
    }
    assert set(rcnn.LOSSES) - set(retinanet.LOSSES) == {"DKD"}
    assert {"GlobalKnowledge", "GID", "PixelRelation"} <= set(rcnn.LOSSES)


def test_of_every_loss_those_that_the_pair_cannot_have_are_named(tiny_cfg, caplog):
    cfg = tiny_cfg("retinanet", "MODEL.RETINANET.NUM_CONVS", 1)
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = [
        *cfg.MODEL.GLOBALKD.TEACHER.OPTS,
        "MODEL.RETINANET.NUM_CONVS",
        1,
    ]
    cfg.MODEL.GLOBALKD.LOSSES = ["FitNet", "CrossKD", "PKD"]
    register_datasets(cfg)
    with pytest.raises(ValueError, match="CrossKD"):
        build(cfg.clone(), every_loss=False)
    model = build(cfg, every_loss=True)
    assert list(model.distiller.losses) == ["FitNet", "PKD"] and "Left out: " in caplog.text


def test_several_that_the_pair_cannot_have_are_left_out_together(tiny_cfg):
    cfg = tiny_cfg("rcnn")
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = [
        *cfg.MODEL.GLOBALKD.TEACHER.OPTS,
        *("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]]),
    ]
    cfg.MODEL.GLOBALKD.LOSSES = ["GID", "FitNet", "FeatureRichness"]
    register_datasets(cfg)
    assert list(build(cfg, every_loss=True).distiller.losses) == ["FitNet"]
