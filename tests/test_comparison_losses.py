"""What all comparison losses promise, on toy steps: zeros, gradients, order, scale, reliability.

The equations are in `test_comparison_equations`.
"""

import pytest
import torch
from torch import nn
from toy_step import DEPTH, attach, evaluate, leaves, toy_bank, toy_step

from globalkd.losses import (
    CWD,
    DKD,
    FBKD,
    FGD,
    FGFI,
    GID,
    ICD,
    MGD,
    PKD,
    RKD,
    CrossKD,
    DeFeat,
    FeatureRichness,
    FitNet,
    HintonKD,
    PredictionGuidedImitation,
    RankMimicking,
    ReviewKD,
)

HEADS = {"positive_weight": 2.0, "negative_weight": 2.0}
SMALL = {"hidden_dim": 8, "num_heads": 2, "start_iter": 0, "blur": 0.0}
ANY, ONE, TWO = (True, False), (True,), (False,)
#: Name -> how to build the loss, and the detectors that have it: one stage (True), two (False).
LOSSES = {
    "hinton": (lambda **k: HintonKD(**k), ANY),
    "hinton_all": (lambda **k: HintonKD(rows="all", **k), ANY),
    "rkd": (lambda: RKD(), ANY),
    "rkd_prototypes": (lambda: RKD(relations="prototypes"), ANY),
    "defeat": (lambda **k: DeFeat(**HEADS, **k), ANY),
    "fitnet": (lambda: FitNet(), ANY),
    "fgfi": (lambda **k: FGFI(**k), ANY),
    "fbkd": (lambda: FBKD(), ANY),
    "gid": (lambda: GID(num_instances=3, min_box_size=2.0, pooler_resolution=2), ANY),
    "richness": (lambda: FeatureRichness(), ANY),
    "rank": (lambda **k: RankMimicking(**k), ONE),
    "pfi": (lambda: PredictionGuidedImitation(), ONE),
    "icd": (lambda **k: ICD(**SMALL, **k), ANY),
    "pkd": (lambda: PKD(), ANY),
    "cwd": (lambda: CWD(), ANY),
    "fgd": (lambda **k: FGD(**k), ANY),
    "mgd": (lambda: MGD(mask_ratio=0.0), ANY),  # what is hidden is random
    "dkd": (lambda **k: DKD(**k), TWO),
    "review": (lambda: ReviewKD(), ANY),
    "cross": (lambda: CrossKD(), ONE),
}
WEIGHTED = ["hinton", "hinton_all", "defeat", "fgfi", "rank", "icd", "fgd", "dkd"]
#: Relations of a repeated batch have pairs without distance; invented objects are random.
NOT_ADDITIVE = ["rkd", "gid", "icd"]
#: No toy box is large enough for p4; a key's bias moves all of a query's scores alike.
WITHOUT_EFFECT = {
    "gid": ("adapters.p4",),
    "icd": ("decoder.key.bias", "decoder.position.bias"),
}
#: What of the student a loss's gradient reaches: its maps, its scores, its box predictions.
REACHED = {
    "hinton": {"scores"},
    "hinton_all": {"scores"},
    "rkd": {"maps"},
    "rkd_prototypes": {"maps"},
    "defeat": {"maps", "scores"},
    "fitnet": {"maps"},
    "fgfi": {"maps"},
    "fbkd": {"maps"},
    "gid": {"maps", "scores", "boxes"},
    "richness": {"maps", "scores"},
    "rank": {"scores"},
    "pfi": {"maps", "scores"},
    "icd": {"maps"},
    "pkd": {"maps"},
    "cwd": {"maps"},
    "fgd": {"maps"},
    "mgd": {"maps"},
    "dkd": {"scores"},
    "review": {"maps"},
    "cross": {"hidden"},
}


def cases(names):
    pairs = [(n, s) for n in names for s in LOSSES[n][1]]
    ids = [f"{n}-{'retinanet' if s else 'rcnn'}" for n, s in pairs]
    return pytest.mark.parametrize(("name", "one_stage"), pairs, ids=ids)


def build(name, context, **kwargs):
    return attach(LOSSES[name][0](**kwargs), context)


def step(name, one_stage, **kwargs):
    bank = toy_bank(equal=kwargs.get("equal", False)) if "prototypes" in name else None
    return toy_step(one_stage=one_stage, bank=bank, **kwargs)


def make_identity(loss):
    """Convolutions that change nothing, and both detectors' own modules alike."""
    parts = ("adapters", "generators", "fusions")
    for name, module in loss.named_modules():
        if isinstance(module, nn.Conv2d) and any(part in name for part in parts):
            nn.init.dirac_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith("attend"):  # the level itself, and nothing of the coarser ones
                nn.init.zeros_(module.weight)
                module.bias.data = torch.tensor([100.0, -100.0])
    if isinstance(loss, FBKD):
        loss.teacher_relations.load_state_dict(loss.student_relations.state_dict())
    if isinstance(loss, FGD):
        loss.teacher_contexts.load_state_dict(loss.student_contexts.state_dict())
    if isinstance(loss, ICD):
        loss.student_value.load_state_dict(loss.decoder.value.state_dict())


@cases(LOSSES)
def test_is_zero_when_student_equals_teacher(name, one_stage):
    context = step(name, one_stage, equal=True)
    loss = build(name, context)
    make_identity(loss)
    for term, value in evaluate(loss, context).items():
        if term not in ("loss_kd_icd_identify", "loss_kd_icd_locate"):  # the decoder's own tasks
            assert value.abs() < 1e-5, term


@cases(LOSSES)
def test_is_positive_when_they_differ(name, one_stage):
    context = step(name, one_stage)
    terms = evaluate(build(name, context), context)
    assert set(terms) == set(build(name, context).weights)
    assert all(value > 0 and value.dtype == torch.float32 for value in terms.values())


def reached(context):
    dense = context.student_dense
    groups = {
        "maps": context.student_maps.values(),
        "scores": [*dense.logits.values(), context.candidates.logits],
        "boxes": dense.deltas.values(),
        "hidden": [x for level in dense.hidden[DEPTH] for x in level],
    }
    return {
        kind
        for kind, tensors in groups.items()
        if any(x.is_leaf and x.grad is not None and x.grad.any() for x in tensors)
    }


@cases(LOSSES)
def test_gradient_reaches_student_and_every_parameter_and_nothing_else(name, one_stage):
    context = step(name, one_stage)
    loss = build(name, context)
    sum(evaluate(loss, context).values()).backward()
    for parameter, value in loss.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.any() or parameter.startswith(WITHOUT_EFFECT.get(name, ())), parameter
    assert reached(context) == REACHED[name]


@cases(LOSSES)
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (1, 1), (9, 4)], ids=str)
def test_any_number_of_boxes_gives_finite_terms_with_gradient(name, one_stage, counts):
    context = step(name, one_stage, counts=counts)
    loss = build(name, context)
    terms = evaluate(loss, context)
    sum(terms.values()).backward()
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
    reached = [x.grad for x in leaves(context) if x.grad is not None]
    assert reached and all(x.isfinite().all() for x in reached)


@cases(LOSSES)
def test_the_order_of_boxes_does_not_matter(name, one_stage):
    values = []
    for order in (None, 1, 2):
        context = step(name, one_stage, counts=(5, 3), order=order)
        values.append(evaluate(build(name, context), context))
    for term in values[0]:
        if term not in ("loss_kd_icd_identify", "loss_kd_icd_locate"):
            for other in values[1:]:
                torch.testing.assert_close(other[term], values[0][term], rtol=1e-4, atol=1e-6)


@cases([n for n in LOSSES if n not in NOT_ADDITIVE])
def test_the_same_images_twice_give_the_same_terms(name, one_stage):
    once, twice = (step(name, one_stage, counts=(4, 2), repeat=n) for n in (1, 2))
    losses = [build(name, x) for x in (once, twice)]
    if one_stage:  # what it divides by is of a batch
        twice.candidates.normalizer = 2 * once.candidates.normalizer
    expected, terms = (evaluate(loss, x) for loss, x in zip(losses, (once, twice)))
    for term, value in terms.items():
        torch.testing.assert_close(value, expected[term], rtol=1e-4, atol=1e-6)


@cases(LOSSES)
def test_terms_are_finite_float32_under_autocast(name, one_stage):
    context = step(name, one_stage)
    loss = build(name, context)
    plain = evaluate(loss, context)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = evaluate(loss, step(name, one_stage))
    for term, value in mixed.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, plain[term], rtol=0.2, atol=1e-4)


@cases(WEIGHTED)
def test_reliability_counts_only_where_it_is_asked_for(name, one_stage):
    plain, banked = (
        toy_step(counts=(5, 3), one_stage=one_stage, bank=b) for b in (None, toy_bank())
    )
    first = next(iter(build(name, plain).weights))
    unweighted = evaluate(build(name, banked), banked)[first]
    assert torch.equal(unweighted, evaluate(build(name, plain), plain)[first])
    without_bank = evaluate(build(name, plain, use_reliability=True), plain)[first]
    torch.testing.assert_close(without_bank, unweighted)
    weighted = evaluate(build(name, banked, use_reliability=True), banked)[first]
    assert not torch.isclose(weighted, unweighted, rtol=1e-5, atol=0)
