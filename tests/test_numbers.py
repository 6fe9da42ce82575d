"""Numbers that are not finite: what features may be, and what a loss that is NaN does."""

import copy
import logging

import hypothesis
import pytest
import torch
from detectron2.utils.events import EventStorage
from hypothesis import given
from hypothesis import strategies as st
from toy_step import DEPTH, SIZE, attach, evaluate, in_half, leaves, toy_bank, toy_step

from globalkd import register_datasets
from globalkd.engine.trainer import DistillTrainer
from globalkd.losses import DISTILL_LOSS_REGISTRY, DistillLoss, StudentOutputs
from globalkd.non_finite import NonFiniteLosses

#: Small modules for toy maps, and terms that are off by default.
SETTINGS = {
    "DeFeat": {"positive_weight": 2.0, "negative_weight": 2.0},
    "FeatureKnowledge": {"background_weight": 4.0},
    "GID": {"num_instances": 3, "pooler_resolution": 2},
    "ICD": {"hidden_dim": 8, "num_heads": 2, "start_iter": 0},
    "InstanceRelation": {"embedding_channels": 4, "filter_channels": 3},
    "PixelRelation": {"num_nodes": (3,), "state_channels": (4,)},
}
VARIANTS = [
    *((name, {}) for name, cls in DISTILL_LOSS_REGISTRY if cls.__module__.startswith("globalkd.")),
    ("RKD", {"relations": "prototypes"}),
    ("HintonKD", {"rows": "all"}),
    ("InstanceRelation", {"match": "features"}),
    ("GlobalKnowledge", {"scope": "all", "penalty": "smooth_l1"}),
    ("ResponseKnowledge", {"one_stage": "softmax"}),
]
#: What features, logits and deltas may degenerate to; "vast" only in float32.
FILLS = {
    "usual": lambda x: x,
    "zero": lambda x: torch.zeros_like(x),
    "identical": lambda x: torch.full_like(x, 0.7),
    "negative": lambda x: -x,
    "huge": lambda x: x * 1e4,
    "tiny": lambda x: x * 1e-20,
    "one huge column": lambda x: torch.zeros_like(x).index_fill(-1, torch.tensor([0]), 1e4),
    "vast": lambda x: x * 1e16,
}
COMMON = [name for name in FILLS if name != "vast"]
BOXES = {
    "usual": lambda boxes: boxes,
    "identical": lambda boxes: boxes[:1].expand_as(boxes).clone(),
    "whole image": lambda boxes: boxes.new_tensor([0, 0, SIZE, SIZE]).expand_as(boxes).clone(),
    "a hundredth of a pixel": lambda boxes: torch.cat([boxes[:, :2], boxes[:, :2] + 0.01], dim=1),
    "a corner": lambda boxes: (
        boxes.new_tensor([SIZE - 1] * 2 + [SIZE] * 2).expand_as(boxes).clone()
    ),
}


#: Terms with products of six features or more leave float32 there.
OF_HIGH_ORDER = ("FBKD", "InstanceRelation", "PixelRelation", "PredictionGuidedImitation")
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cases(without=()):
    """Every variant, with the heads of one- and of two-stage detectors where it knows both."""
    return pytest.mark.parametrize(
        ("name", "settings", "one_stage"),
        [
            (name, settings, one_stage)
            for name, settings in VARIANTS
            for one_stage in (True, False)
            if name not in without
            and DISTILL_LOSS_REGISTRY.get(name).stages in ("any", "one" if one_stage else "two")
            and (one_stage or "one_stage" not in settings)
        ],
    )


def not_finite(name, settings, one_stage, *, counts=(3, 1), fills, boxes="usual", dtype="float32"):
    """Names of the terms and of the gradients of a step that are not finite."""
    context = toy_step(
        counts,
        one_stage=one_stage,
        bank=toy_bank(),
        fills=[FILLS[fill] for fill in fills],
        move_boxes=BOXES[boxes],
    )
    if dtype != "float32":  # as autocast leaves what convolutions and linear layers give
        context = in_half(context, DTYPES[dtype])
    settings = {**SETTINGS.get(name, {}), **settings}
    loss = attach(DISTILL_LOSS_REGISTRY.get(name)(**settings), context)
    with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "float32"):
        tensors = evaluate(loss, context)
    sum(tensors.values()).backward()
    if dtype != "float16":  # its gradients overflow; the gradient scaler sees to that
        tensors.update({n: p.grad for n, p in loss.named_parameters()})
        tensors.update({f"input {i}": x.grad for i, x in enumerate(leaves(context))})
    return [n for n, x in tensors.items() if x is not None and not x.isfinite().all()]


@cases()
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@given(
    counts=st.tuples(st.integers(0, 6), st.integers(0, 3)),
    fills=st.tuples(st.sampled_from(COMMON), st.sampled_from(COMMON)),
    boxes=st.sampled_from(list(BOXES)),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_degenerate_steps_give_finite_terms_and_gradients(name, settings, one_stage, **step):
    assert not_finite(name, settings, one_stage, **step) == []


@cases(without=OF_HIGH_ORDER)
@pytest.mark.parametrize("fills", [("vast", "usual"), ("usual", "vast"), ("vast", "vast")])
def test_features_of_1e16_are_finite_in_float32(name, settings, one_stage, fills):
    assert not_finite(name, settings, one_stage, fills=fills) == []


# What a loss that is NaN does to a training


class Diverging(DistillLoss):
    """A loss that is NaN, with infinite derivatives, at the iterations of `at`."""

    at = ()

    def __init__(self):
        super().__init__({"loss_kd_diverging": 1.0})

    def attach(self, levels):
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, context):
        maps = next(iter(context.student_maps.values()))
        term = (maps * self.scale).square().mean()
        if context.iteration in self.at:
            term = term + (maps.sum() * self.scale * 0.0).sqrt().sum() * float("nan")
        return {"loss_kd_diverging": term}


LOSSES = ["FitNet", "InstanceRelation", "Diverging"]


@pytest.fixture
def diverging(tiny_cfg, monkeypatch):
    """Builds a trainer with `Diverging` beside FitNet and a loss with frozen parameters."""
    monkeypatch.setitem(DISTILL_LOSS_REGISTRY._obj_map, "Diverging", lambda cfg: Diverging())

    def build(kind, *opts, at):
        monkeypatch.setattr(Diverging, "at", at)
        cfg = tiny_cfg(kind, "MODEL.GLOBALKD.LOSSES", LOSSES, *opts)
        cfg.TEST.EVAL_PERIOD = 0
        cfg.DATASETS.TEST = ()
        register_datasets(cfg)
        return DistillTrainer(cfg)

    return build


def parameters(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
def test_it_ends_training_with_its_name_the_step_and_the_images(diverging, kind):
    trainer = diverging(kind, at=(2,))
    said = r"Iteration 2: loss_kd_diverging is nan on .*\.png, .*\.png\. .*\"skip\""
    before = {}
    check = trainer.distiller.non_finite.check
    trainer.distiller.non_finite.check = lambda: (before.update(parameters(trainer)), check())
    with pytest.raises(FloatingPointError, match=said):
        trainer.train()
    after = parameters(trainer)
    assert all(torch.equal(after[n], x) for n, x in before.items())  # the step was not made


@pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
def test_by_key_the_step_distils_nothing_and_is_counted(diverging, kind, caplog, monkeypatch):
    monkeypatch.setattr("globalkd.distiller.LOG_PERIOD", 4)
    trainer = diverging(kind, "MODEL.GLOBALKD.NON_FINITE_LOSS", "skip", at=(1, 2))
    with caplog.at_level(logging.WARNING, logger="globalkd"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert trainer.storage.history("kd/skipped_steps").latest() == 2
    (first, second) = [x.getMessage() for x in caplog.records if "did not distil" in x.getMessage()]
    assert first.startswith("Iteration 1: loss_kd_diverging is nan on ") and ".png" in first
    assert second.startswith("Iteration 2: ")


@pytest.mark.faults
def test_steps_skipped_since_the_last_log_are_named_at_the_end(diverging, caplog):
    trainer = diverging("rcnn", "MODEL.GLOBALKD.NON_FINITE_LOSS", "skip", at=(1, 3))
    with caplog.at_level(logging.WARNING, logger="globalkd"):
        trainer.train()  # 4 steps, and LOG_PERIOD is 20
    found = [x.getMessage() for x in caplog.records if "did not distil" in x.getMessage()]
    assert [x.split(":")[0] for x in found] == ["Iteration 1", "Iteration 3"]


def step(model, batch, without=None):
    """Losses of a step with fixed random numbers; gradients of those not left out."""
    if hasattr(model, "loss_normalizer"):  # RetinaNet's running mean
        model.loss_normalizer = 100
    with EventStorage(0):
        torch.manual_seed(1)
        losses = model(batch)
    model.zero_grad()
    sum(x for name, x in losses.items() if not without or without not in name).backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
def test_a_skipped_step_has_the_gradients_of_the_detection_losses(diverging, kind, batch):
    model = diverging(kind, "MODEL.GLOBALKD.NON_FINITE_LOSS", "skip", at=(0,)).model
    losses, found = step(model, batch)
    assert losses["loss_kd_diverging"] == 0 and losses["loss_kd_fitnet"] == 0
    _, expected = step(model, batch, without="kd")
    for name, gradient in found.items():
        if name in expected:
            torch.testing.assert_close(gradient, expected[name], msg=name)
        else:
            assert name.startswith("distiller.losses.") and not gradient.any()


@pytest.mark.parametrize("one_stage", [True, False])
def test_nothing_that_the_student_leaves_lets_gradients_of_a_skipped_step_through(one_stage):
    context = toy_step(one_stage=one_stage)
    watch, grads = NonFiniteLosses(skip=True), []
    for finite in (True, False):
        outputs = watch.watch_student(
            StudentOutputs(
                context.student_maps, context.candidates, context.positives, context.student_dense
            )
        )
        dense = outputs.dense
        tensors = [*outputs.features.values(), *dense.logits.values(), *dense.deltas.values()]
        tensors += [outputs.candidates.logits]
        tensors += [x for level in dense.hidden[DEPTH] for x in level]
        watch._pass.finite = torch.tensor(finite)
        grads.append(torch.autograd.grad(sum(x.sum() for x in tensors), leaves(context)))
    assert all(x.all() for x in grads[0]) and not any(x.any() for x in grads[1])


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_steps_before_one_backward_pass_the_wrong_one_alone_is_left_out(
    diverging, first, batch
):
    model = diverging("rcnn", "MODEL.GLOBALKD.NON_FINITE_LOSS", "skip", at=(0,)).model
    total = 0.0
    for iteration in (first, 1 - first):
        with EventStorage(iteration):
            losses = model(batch)
        total = total + sum(losses.values())
        if iteration == 0:
            assert losses["loss_kd_fitnet"] == 0
        else:
            assert losses["loss_kd_fitnet"] > 0
    total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    adapters = list(model.distiller.losses["FitNet"].parameters())
    assert not any(p.grad.any() for p in adapters)  # one gradient of both steps
    with EventStorage(2):
        sum(model(batch).values()).backward()
    assert any(p.grad.any() for p in adapters)


def test_a_copy_skips_steps_as_well(diverging, batch):
    model = diverging("rcnn", "MODEL.GLOBALKD.NON_FINITE_LOSS", "skip", at=(0,)).model
    step(model, batch)
    _, found = step(copy.deepcopy(model), batch)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
def test_watching_does_not_change_a_step_that_is_finite(diverging, kind, batch):
    results = []
    for key in ("raise", "skip"):
        torch.manual_seed(0)
        model = diverging(kind, "MODEL.GLOBALKD.NON_FINITE_LOSS", key, at=()).model
        results.append(step(model, batch))
    torch.testing.assert_close(results[1], results[0])


def test_gradients_that_overflow_are_not_mistaken_for_it(diverging):
    trainer = diverging("rcnn", at=())
    watched = trainer.distiller.non_finite
    watched.watch_terms({"loss_kd_x": torch.tensor(1.0, requires_grad=True)}, 0, [])
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    watched.check()
