"""All losses without prototypes in one run, on real detectors: sums, head runs, refusals."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import KINDS, ROOT, TINY, make_batch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from globalkd import add_globalkd_config
from globalkd.losses import (
    CWD,
    DKD,
    FGD,
    FGFI,
    GID,
    ICD,
    MGD,
    RKD,
    CrossKD,
    DeFeat,
    FeatureRichness,
    HintonKD,
    PredictionGuidedImitation,
    RankMimicking,
)
from globalkd.pairing import UnfitLosses, check_pair

DRKD = ["PixelRelation", "InstanceRelation", "InstanceFeature"]
MAPS = ["FitNet", "FGFI", "DeFeat", "FBKD", "RKD", "ICD", *DRKD]
MAPS += ["CWD", "PKD", "FGD", "MGD", "ReviewKD"]
BOTH = [*MAPS, "HintonKD", "GID", "FeatureRichness"]
ONE_CELL = ("p6", "p7")  # levels of one cell for an image of 64 pixels
METHODS = {
    "rcnn": [*BOTH, "DKD"],
    "retinanet": [*BOTH, "RankMimicking", "PredictionGuidedImitation"],
}


def build(kind, losses, *opts, teacher=None):
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.merge_from_file(str(ROOT / f"configs/quick/Base-digits-{kind}.yaml"))
    cfg.merge_from_list([*TINY, "MODEL.FPN.NORM", "BN"])
    node = cfg.MODEL.GLOBALKD
    cfg.MODEL.META_ARCHITECTURE, node.LOSSES = KINDS[kind], losses
    node.TEACHER.CONFIG_FILE = str(ROOT / f"configs/quick/Base-digits-{teacher or kind}.yaml")
    node.TEACHER.OPTS = ["MODEL.FPN.OUT_CHANNELS", 32]
    node.ICD.HIDDEN_DIM, node.ICD.START_ITER, node.HINTON.ROWS = 16, 0, "all"
    node.DEFEAT.POSITIVE_WEIGHT = node.DEFEAT.NEGATIVE_WEIGHT = 0.0 if teacher else 1.0
    cfg.merge_from_list(list(opts))
    torch.manual_seed(0)
    return build_model(cfg).train()


@pytest.fixture(scope="module")
def models():
    return {kind: build(kind, losses) for kind, losses in METHODS.items()}


def step(model, counts, iteration=0):
    torch.manual_seed(1)
    with EventStorage(iteration):
        return model(make_batch(counts))


both = pytest.mark.parametrize("kind", list(KINDS))


@both
def test_all_methods_train_together(kind, models):
    model = copy.deepcopy(models[kind])
    before = copy.deepcopy(model.distiller.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for iteration in range(3):
        losses = step(model, [4, 0, 1], iteration)
        assert all(value.isfinite() for value in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(p.grad is None for p in model.distiller.teacher.model.parameters())
    names = [name for loss in model.distiller.losses.values() for name in loss.weights]
    assert len(names) == len(set(names)) and set(names) <= set(losses)
    after = model.distiller.state_dict()
    unmoved = {k for k, v in before.items() if torch.equal(v, after[k])}
    # FGFI and GID read a box on the level that fits it, and no image has one for a coarse level.
    # One cell alone relates to nothing. DRKD's relation matrices of the teacher are fixed.
    units = [
        f"losses.PixelRelation.{x}_units.{p}" for x in ("student", "teacher") for p in ONE_CELL
    ]
    # Nor is there a choice in it for FGD's attention, and MGD may hide it.
    units += [
        f"losses.FGD.{x}_contexts.{p}.attend" for x in ("student", "teacher") for p in ONE_CELL
    ]
    units += [f"losses.MGD.generators.{p}" for p in ONE_CELL]
    expected = ("losses.FGFI.adapters", "losses.GID.adapters", *units)
    fixed = {k for k, v in model.distiller.named_parameters() if not v.requires_grad}
    assert fixed <= unmoved and all(".teacher." in k for k in fixed)
    assert not {k for k in unmoved - fixed if not k.startswith(expected)}, unmoved


@both
def test_every_head_runs_once_whatever_is_summed(kind, models):
    model, counts = models[kind], {}
    student, teacher = model, model.distiller.teacher.model
    parts = {"backbone": "backbone", "head": "head"}
    if kind == "rcnn":
        parts["head"], parts["rpn"] = "roi_heads.box_head", "proposal_generator.rpn_head"
    handles = []
    for who, detector in {"student": student, "teacher": teacher}.items():
        for part, path in parts.items():
            handles.append(
                detector.get_submodule(path).register_forward_hook(
                    lambda *_, key=(who, part): counts.update({key: counts.get(key, 0) + 1})
                )
            )
    step(model, [4, 0])
    for handle in handles:
        handle.remove()
    assert counts == {(who, part): 1 for who in ("student", "teacher") for part in parts}


@both
def test_the_teacher_says_the_same_of_positives_alone_as_among_all_rows(kind, models, monkeypatch):
    distiller, contexts = models[kind].distiller, []
    gather = distiller._context
    monkeypatch.setattr(
        distiller, "_context", lambda *args: contexts.append(gather(*args)) or contexts[-1]
    )
    step(models[kind], [4, 0, 3])
    (context,) = contexts
    assert "predictions" in context.reads
    alone, among = replace(context, reads={"responses"}).responses, context.responses
    assert len(alone.teacher) == len(context.positives) > 0
    torch.testing.assert_close(alone.teacher, among.teacher)
    assert torch.equal(alone.student, context.predictions.student[context.positives.rows])
    assert torch.equal(alone.labels, context.predictions.labels[context.positives.rows])
    assert context.predictions.background.any() and not alone.background.any()


@both
def test_a_batch_without_boxes_gives_finite_terms_with_gradient(kind, models):
    model = copy.deepcopy(models[kind])
    losses = step(model, [0, 0])
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    trained = [p for p in model.distiller.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_methods_that_read_maps_alone_cross_families():
    model = build("rcnn", MAPS, teacher="retinanet")
    losses = step(model, [4, 2])
    assert {p.student for p in model.distiller.levels} == {"p3", "p4", "p5", "p6"}
    assert all(value.isfinite() for value in losses.values())


@pytest.mark.faults
@pytest.mark.parametrize("loss", [RankMimicking(), HintonKD(), FeatureRichness(), GID(), DKD()])
def test_what_a_pair_cannot_have_is_refused_by_name(loss, models):
    teacher = models["retinanet"].distiller.teacher
    name = type(loss).__name__
    with pytest.raises(ValueError, match=rf"\['{name}'\].*MODEL.GLOBALKD.LOSSES"):
        check_pair(models["rcnn"], teacher, {name: loss}, levels=["p3"], num_classes=10)


@pytest.mark.faults
def test_a_softmax_method_is_refused_where_there_is_none(models):
    model = models["retinanet"]
    with pytest.raises(ValueError, match=r"\['DKD'\] are defined for two-stage.*a Faster R-CNN"):
        check_pair(model, model.distiller.teacher, {"DKD": DKD()}, levels=["p3"], num_classes=10)


@pytest.mark.faults
def test_levels_without_anchors_are_named(models):
    model = models["retinanet"]
    with pytest.raises(ValueError, match=r"\['FGFI'\].*\['p2'\].*IN_FEATURES"):
        check_pair(
            model, model.distiller.teacher, {"FGFI": FGFI()}, levels=["p2", "p3"], num_classes=10
        )


@pytest.mark.faults
@pytest.mark.parametrize("loss", [GID(), PredictionGuidedImitation(), FeatureRichness()])
def test_dense_scores_of_other_classes_are_refused(loss, models):
    teacher = copy.copy(models["retinanet"].distiller.teacher)
    teacher.model = copy.copy(teacher.model)
    teacher.model.num_classes = 1  # would broadcast
    name = type(loss).__name__
    with pytest.raises(ValueError, match=rf"\['{name}'\].*teacher has 1 classes"):
        check_pair(models["retinanet"], teacher, {name: loss}, levels=["p3"], num_classes=10)


@pytest.mark.parametrize("loss", [FeatureRichness(score_weight=0.0), CrossKD(depth=1)])
def test_what_compares_no_classes_takes_a_teacher_of_others(loss, models):
    teacher = copy.copy(models["retinanet"].distiller.teacher)
    teacher.model = copy.copy(teacher.model)
    teacher.model.num_classes = 12
    losses = {type(loss).__name__: loss}
    check_pair(models["retinanet"], teacher, losses, levels=["p3"], num_classes=10)


@pytest.mark.faults
@pytest.mark.parametrize(
    "kind, loss", [("rcnn", "GID"), ("retinanet", "GID"), ("retinanet", "HintonKD")]
)
def test_anchors_at_another_offset_are_refused(kind, loss):
    with pytest.raises(ValueError, match=rf"\['{loss}'\].*anchors.*offsets 0.0 and 0.5"):
        build(kind, [loss], "MODEL.ANCHOR_GENERATOR.OFFSET", 0.5)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: HintonKD(temperature=0.0), "HINTON.TEMPERATURE is 0"),
        (lambda: HintonKD(rows="some"), "HINTON.ROWS is 'some'"),
        (lambda: DeFeat(temperature=-1.0), "DEFEAT.TEMPERATURE is -1"),
        (lambda: RKD(relations="both"), "RKD.RELATIONS is 'both'"),
        (lambda: RKD(max_instances=2), "RKD.MAX_INSTANCES is 2"),
        (lambda: FGFI(threshold=1.0), "FGFI.THRESHOLD is 1"),
        (lambda: GID(num_instances=0), "GID.NUM_INSTANCES is 0"),
        (lambda: CWD(temperature=0.0), "CWD.TEMPERATURE is 0"),
        (lambda: FGD(temperature=-1.0), "FGD.TEMPERATURE is -1"),
        (lambda: MGD(mask_ratio=1.0), "MGD.MASK_RATIO is 1"),
        (lambda: DKD(temperature=0.0), "DKD.TEMPERATURE is 0"),
        (lambda: ICD(hidden_dim=30, num_heads=2), "ICD.HIDDEN_DIM is 30"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(make, key):
    with pytest.raises(ValueError, match=f"MODEL.GLOBALKD.{key}"):
        make()


@pytest.mark.faults
def test_levels_that_gid_cannot_pool_from_are_named(tiny_cfg):
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.LOSSES", ["GID"])
    cfg.MODEL.GLOBALKD.IN_FEATURES = ["p3", "p5"]
    with pytest.raises(UnfitLosses, match=r"strides double.*IN_FEATURES is \['p3', 'p5'\].*8, 32"):
        build_model(cfg)
