"""GlobalKD's own terms against plain references of Eq. (6) to (8), written with loops.

Eq. (5) and the "coefficients" of Eq. (8) are in `test_prototype_bank`.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou
from toy_step import (
    CLASSES,
    STRIDES,
    attach,
    close,
    evaluate,
    mean,
    row_divergence,
    toy_bank,
    toy_step,
)

from globalkd.losses import RKD, FeatureKnowledge, GlobalKnowledge, ResponseKnowledge
from globalkd.losses.divergence import sigmoid_kl

both_heads = pytest.mark.parametrize("one_stage", [True, False], ids=["retinanet", "rcnn"])
weighed = pytest.mark.parametrize("use_reliability", [True, False])


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def coefficients(context, level, row):
    """Of student and teacher, each {(class, prototype): cosine}."""
    found = []
    for of_level, bank in (
        (context.student_instance_features, "student_prototypes"),
        (context.teacher_instance_features, "teacher_prototypes"),
    ):
        prototypes = getattr(context.bank.levels[level], bank)
        feature = of_level[level][row].detach()
        found.append(
            {
                (k, p): cosine(feature, prototypes[k, p])
                for k in range(CLASSES)
                for p in range(prototypes.shape[1])
            }
        )
    return found


def omega(context, level, row):
    """1 - |difference of the largest cosines| on the prototypes of the instance's class."""
    label = int(context.instances.classes[row])
    largest = [
        max(v for (k, _), v in w.items() if k == label) for w in coefficients(context, level, row)
    ]
    return max(0.0, 1 - abs(largest[0] - largest[1]))


@weighed
@pytest.mark.parametrize("penalty", ["l2", "smooth_l1"])
@pytest.mark.parametrize("scope", ["class", "all"])
def test_global_knowledge_is_equation_6(scope, penalty, use_reliability):
    # So different that some coefficients are more than 1 apart, where smooth L1 is linear.
    context = toy_step(bank=toy_bank(), fills=(lambda x: x - 0.6, None))
    gaps, terms = [], []
    for level in STRIDES:
        for row, label in enumerate(context.instances.classes.tolist()):
            student, teacher = coefficients(context, level, row)
            gap = [student[k] - teacher[k] for k in student if scope == "all" or k[0] == label]
            gaps += [abs(g) for g in gap]
            quadratic = [penalty == "l2" or abs(g) < 1 for g in gap]
            total = sum(0.5 * g * g if q else abs(g) - 0.5 for g, q in zip(gap, quadratic))
            total /= CLASSES if scope == "all" else 1
            terms.append(total * (omega(context, level, row) if use_reliability else 1))
    assert max(gaps) > 1 and 0 < mean(terms) < max(terms)
    loss = GlobalKnowledge(scope=scope, penalty=penalty, use_reliability=use_reliability)
    close(evaluate(attach(loss, context), context)["loss_kd_global"], mean(terms))


@pytest.mark.parametrize("scope", ["class", "all"])
def test_classes_without_prototypes_do_not_count_in_global_knowledge(scope):
    bank = toy_bank()
    context = toy_step(bank=bank)
    kinds = context.instances.classes
    without = int(kinds[0])
    for level in bank.levels.values():
        level.valid[without] = False
    bank._prepare()
    expected = []
    for level in STRIDES:
        for row, label in enumerate(kinds.tolist()):
            if scope == "class" and label == without:
                continue
            student, teacher = coefficients(context, level, row)
            gap = {k: student[k] - teacher[k] for k in student if k[0] != without}
            gap = [g for k, g in gap.items() if scope == "all" or k[0] == label]
            expected.append(sum(0.5 * g * g for g in gap) / (CLASSES - 1 if scope == "all" else 1))
    assert without in kinds and (kinds != without).any()
    loss = GlobalKnowledge(scope=scope, use_reliability=False)
    close(evaluate(attach(loss, context), context)["loss_kd_global"], mean(expected))
    if scope == "all":
        loss = RKD(relations="prototypes")
        found = evaluate(attach(loss, context), context)["loss_kd_rkd_prototypes"]
        close(found, mean(expected))  # smooth L1 is half the square up to 1


def weight_of_cell(context, level, image, y, x, use_reliability):
    """The largest weight of an instance whose box touches the cell; 0 of none."""
    stride, weights = STRIDES[level], [0.0]
    for row, box in enumerate(context.instances.boxes.tolist()):
        left, top, right, bottom = box
        touched = left < (x + 1) * stride and right > x * stride
        touched &= top < (y + 1) * stride and bottom > y * stride
        if touched and context.instances.image_index[row] == image:
            weights.append(omega(context, level, row) if use_reliability else 1.0)
    return max(weights)


@weighed
def test_feature_knowledge_is_equation_7_and_the_background_its_complement(use_reliability):
    context = toy_step(bank=toy_bank(), instances="ground_truth")
    loss = FeatureKnowledge(background_weight=1.0, use_reliability=use_reliability)
    attach(loss, context)
    first = context.instances.boxes[context.instances.image_index == 0]
    assert (box_iou(first, first) > 0).sum() > len(first)  # some overlap: the largest weight counts
    inside, outside = [], []
    for level in STRIDES:
        student = loss.adapters[level](context.student_maps[level]).detach()
        squared = (student - context.teacher_maps[level]).square()
        errors, weights, others = [], [], []
        for image, y, x in itertools.product(*(range(n) for n in squared[:, 0].shape)):
            error = 0.5 * float(squared[image, :, y, x].mean())
            weight = weight_of_cell(context, level, image, y, x, use_reliability)
            if weight:
                errors.append(weight * error)
                weights.append(weight)
            else:
                others.append(error)
        inside.append(sum(errors) / sum(weights))
        outside.append(mean(others))
    terms = evaluate(loss, context)
    close(terms["loss_kd_feature"], mean(inside))
    close(terms["loss_kd_background"], mean(outside))


@weighed
@both_heads
@pytest.mark.parametrize("reading", ["sigmoid", "softmax"])
def test_response_knowledge_is_a_weighted_divergence_of_the_positives(
    reading, one_stage, use_reliability
):
    context = toy_step(one_stage=one_stage, bank=toy_bank())
    positives, candidates, terms = context.positives, context.candidates, []
    for row, candidate in enumerate(positives.rows.tolist()):
        student, teacher = candidates.logits[candidate].detach(), candidates.teacher[candidate]
        value = row_divergence(student, teacher, 3.0, one_stage and reading == "sigmoid")
        level = {s: n for n, s in STRIDES.items()}[int(positives.strides[row])]
        terms.append(value * (omega(context, level, row) if use_reliability else 1.0))
    loss = ResponseKnowledge(temperature=3.0, one_stage=reading, use_reliability=use_reliability)
    close(evaluate(attach(loss, context), context)["loss_kd_response"], mean(terms))


def test_the_binary_divergence_is_cross_entropy_less_entropy():
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(50, 7, generator=generator) * 8 for _ in range(2))
    s.requires_grad_()
    found = sigmoid_kl(s, t, 2.0)
    wide, aim = s.double() / 2, (t.double() / 2).sigmoid()
    entropy = -torch.special.xlogy(aim, aim) - torch.special.xlogy(1 - aim, 1 - aim)
    cross_entropy = F.binary_cross_entropy_with_logits(wide, aim, reduction="none")
    expected = 4 * (cross_entropy - entropy).sum(dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(x.sum(), s)[0] for x in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    alike = torch.tensor([[-90.0, -17.0, -3.0, 0.0, 3.0, 17.0, 90.0]])
    assert sigmoid_kl(alike, alike, 1.0).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(50, 7), (2, 3, 7, 5), (0, 4)])
def test_parts_of_the_binary_divergence_are_the_whole(shape, dtype, monkeypatch):
    s, t, factor = torch.randn(shape), torch.randn(shape), torch.rand(shape[:-1])
    results = []
    for at_a_time in (1 << 20, 16, 1):  # all rows, a few, one
        monkeypatch.setattr("globalkd.losses.divergence._AT_A_TIME", at_a_time)
        ours = s.to(dtype).requires_grad_()
        found = sigmoid_kl(ours, t.to(dtype), 2.0)
        (gradient,) = torch.autograd.grad((found * factor).sum(), ours)
        assert found.dtype == torch.float32 and gradient.dtype == dtype
        results.append((found, gradient))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.faults
def test_a_softmax_over_a_single_class_is_refused():
    responses = SimpleNamespace(student=torch.zeros(3, 1), teacher=torch.ones(3, 1), one_stage=True)
    loss = ResponseKnowledge(one_stage="softmax", use_reliability=False)
    with pytest.raises(ValueError, match="ONE_STAGE is 'softmax'.*set it to 'sigmoid'"):
        loss(SimpleNamespace(responses=responses))
