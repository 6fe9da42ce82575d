"""The comparison losses' equations against plain references, written with loops."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import nn
from torchvision.ops import box_iou, roi_align
from toy_step import (
    CLASSES,
    NORMALIZER,
    STRIDES,
    attach,
    close,
    evaluate,
    mean,
    row_divergence,
    toy_bank,
    toy_step,
)

from globalkd.losses import (
    FBKD,
    FGFI,
    GID,
    RKD,
    DeFeat,
    FeatureRichness,
    FitNet,
    GlobalKnowledge,
    HintonKD,
    PredictionGuidedImitation,
    RankMimicking,
    defeat,
)
from globalkd.losses.attention import attention
from globalkd.losses.fbkd import NonLocal, attention_mask, root_mean_square
from globalkd.losses.feature_richness import feature_richness, rich_score_loss
from globalkd.losses.fgfi import near_object_masks
from globalkd.losses.gid import anchors_at, general_instances
from globalkd.losses.rank_mimicking import grouped_log_softmax, prediction_guided_loss
from globalkd.losses.rkd import angle_loss, distance_loss

both = pytest.mark.parametrize("one_stage", [True, False], ids=["retinanet", "rcnn"])


@both
@pytest.mark.parametrize("rows", ["positives", "all"])
def test_hinton(rows, one_stage):
    context = toy_step(one_stage=one_stage, bank=toy_bank())
    x = context.candidates
    weight = dict(zip(context.positives.rows.tolist(), context.response_reliability.tolist()))
    kept = [i for i, label in enumerate(x.labels) if label >= 0]
    kept = [i for i in kept if rows == "all" or i in weight]
    terms = [
        row_divergence(x.logits[i].detach(), x.teacher[i], 3.0, one_stage) * weight.get(i, 1.0)
        for i in kept
    ]
    count = NORMALIZER if one_stage and rows == "all" else len(kept)
    loss = attach(HintonKD(temperature=3.0, rows=rows, use_reliability=True), context)
    close(evaluate(loss, context)["loss_kd_hinton"], sum(terms) / count)


def relations(x, y, order):
    """Mean Huber distance of the relations of all pairs (order 2) or triples (order 3)."""

    def distances(z):
        d = [[float((a - b).norm()) for b in z] for a in z]
        positive = [v for row in d for v in row if v > 0]
        return [[v / mean(positive) for v in row] for row in d]

    def cosine(z, i, j, k):
        a, b = z[i] - z[j], z[k] - z[j]
        return float(a @ b / (a.norm() * b.norm())) if a.any() and b.any() else 0.0

    indices = list(itertools.product(range(len(x)), repeat=order))
    if order == 2:
        of_x, of_y = distances(x), distances(y)
        gaps = [of_x[i][j] - of_y[i][j] for i, j in indices]
    else:
        gaps = [cosine(x, *i) - cosine(y, *i) for i in indices]
    return mean(0.5 * g * g if abs(g) < 1 else abs(g) - 0.5 for g in gaps)


def test_rkd_relates_all_pairs_and_triples():
    x, y = torch.randn(5, 3), torch.randn(5, 4)
    x[1] = x[0]  # two instances at one place
    close(distance_loss(x, y), relations(x, y, 2))
    close(angle_loss(x, y), relations(x, y, 3))


def test_rkd_gradient_is_finite_where_instances_coincide():
    x = torch.randn(4, 3).index_fill(0, torch.tensor([1, 2]), 1.0).requires_grad_()
    (distance_loss(x, torch.randn(4, 3)) + angle_loss(x, torch.randn(4, 3))).backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() < 100


def test_rkd_spans_angles_between_an_even_subset_of_many_instances_and_says_so():
    context = toy_step(counts=(9, 9))
    terms = RKD(max_instances=4)(context)
    last = len(context.instances) - 1
    rows = [0, last // 3, 2 * last // 3, last]
    pairs = [
        (context.student_instance_features[n], context.teacher_instance_features[n])
        for n in STRIDES
    ]
    close(terms["loss_kd_rkd_angle"], mean(angle_loss(s[rows], t[rows]) for s, t in pairs))
    close(terms["loss_kd_rkd_distance"], mean(distance_loss(s, t) for s, t in pairs))
    assert context.observations["kd/rkd_without_angles"] == last + 1 - 4
    RKD(max_instances=last + 1)(context)
    assert context.observations["kd/rkd_without_angles"] == 0


def test_rkd_with_prototypes_is_the_global_knowledge_of_all_classes():
    context = toy_step(bank=toy_bank())
    expected = GlobalKnowledge(scope="all", penalty="smooth_l1", use_reliability=False)(context)
    value = RKD(relations="prototypes")(context)["loss_kd_rkd_prototypes"]
    assert torch.equal(value, expected["loss_kd_global"])


def cell_error(student, teacher, cells):
    """1/2 squared difference, mean over the channels of the given (image, y, x) cells."""
    return mean(
        float((student[n, :, y, x] - teacher[n, :, y, x]).square().mean().detach()) / 2
        for n, y, x in cells
    )


def cells_of(maps):
    return itertools.product(*(range(n) for n in (maps.shape[0], *maps.shape[2:])))


def test_fitnet():
    context = toy_step()
    loss = attach(FitNet(), context)
    expected = mean(
        cell_error(loss.adapters[n](context.student_maps[n]), t, cells_of(t))
        for n, t in context.teacher_maps.items()
    )
    close(evaluate(loss, context)["loss_kd_fitnet"], expected)


def test_defeat_puts_a_box_on_one_level():
    sides = torch.tensor([4.0, 111.0, 112.0, 223.0, 224.0, 5000.0]) - 1  # w + 1 is the code's side
    boxes = torch.stack([torch.zeros(6), torch.zeros(6), sides, sides], dim=1)
    assert defeat.box_levels(boxes, 3).tolist() == [0, 0, 1, 1, 2, 2]


@both
def test_defeat(one_stage, monkeypatch):
    monkeypatch.setattr(defeat, "FINEST_SIDE", 9.0)  # so that the toy's boxes are on both levels
    context = toy_step(one_stage=one_stage)
    loss = attach(DeFeat(positive_weight=1.0, negative_weight=1.0, temperature=2.0), context)
    terms, inside, outside = evaluate(loss, context), [], []
    gt = context.ground_truth
    levels = [int(math.sqrt((x1 - x0 + 1) * (y1 - y0 + 1)) >= 18) for x0, y0, x1, y1 in gt.boxes]
    assert set(levels) == {0, 1}
    for level, (name, teacher) in enumerate(context.teacher_maps.items()):
        student, stride = loss.adapters[name](context.student_maps[name]), STRIDES[name]

        def touched(cell, stride=stride, level=level):
            n, y, x = cell
            low, high = torch.tensor([x, y]) * stride, torch.tensor([x + 1, y + 1]) * stride
            return any(
                n == i and own == level and (low < box[2:]).all() and (high > box[:2]).all()
                for i, box, own in zip(gt.image_index, gt.boxes, levels)
            )

        cells = list(cells_of(teacher))
        inside.append(cell_error(student, teacher, [c for c in cells if touched(c)]))
        outside.append(cell_error(student, teacher, [c for c in cells if not touched(c)]))
    close(terms["loss_kd_defeat_object"], mean(inside))
    close(terms["loss_kd_defeat_background"], mean(outside))
    x = context.candidates
    for kind, chosen in {"positive": x.labels < CLASSES, "negative": x.labels == CLASSES}.items():
        rows = (chosen & (x.labels >= 0)).nonzero().flatten()
        expected = mean(
            row_divergence(x.logits[i].detach(), x.teacher[i], 2.0, one_stage) for i in rows
        )
        close(terms[f"loss_kd_defeat_{kind}"], expected)


def test_fgfi_selects_cells_near_objects():
    context = toy_step(counts=(3, 2))
    gt, anchors = context.ground_truth, list(context.student_dense.anchors.values())
    weights = [torch.rand(len(gt)) for _ in anchors]
    masks = near_object_masks(gt, weights, anchors, num_images=2, threshold=0.5)
    expected = [torch.zeros_like(m) for m in masks]
    for row, (image, box) in enumerate(zip(gt.image_index, gt.boxes)):
        best = max(float(box_iou(box[None], a.reshape(-1, 4)).max()) for a in anchors)
        for level, a in enumerate(anchors):
            for y, x in itertools.product(range(a.shape[0]), range(a.shape[1])):
                if box_iou(box[None], a[y, x]).max() > 0.5 * best:
                    cell = expected[level][image]
                    cell[y, x] = max(cell[y, x], weights[level][row])
    for mask, other in zip(masks, expected):
        assert torch.equal(mask, other)
    assert 0 < sum(int((m > 0).sum()) for m in masks) < sum(m.numel() for m in masks)


def test_fgfi_is_the_error_on_those_cells():
    context = toy_step()
    loss = attach(FGFI(threshold=0.7), context)
    masks = loss._masks(context)
    expected = mean(
        cell_error(
            loss.adapters[n](context.student_maps[n]), context.teacher_maps[n], m.nonzero().tolist()
        )
        for n, m in zip(STRIDES, masks)
    )
    close(evaluate(loss, context)["loss_kd_fgfi"], expected)


def test_fbkd_attention_and_its_masks():
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    spatial, channel = attention(s)
    close(spatial[1, 0, 2, 3], s[1, :, 2, 3].abs().mean())
    close(channel[0, 2, 0, 0], s[0, 2].abs().mean())
    mask = attention_mask(spatial.clone().requires_grad_(), attention(t)[0], 0.5)
    assert not mask.requires_grad
    scores = ((s.abs().mean(1) + t.abs().mean(1)) / 0.5).exp()
    close(mask[1, 0], 20 * scores[1] / scores[1].sum())
    close(root_mean_square(s), math.sqrt(mean(float(v) ** 2 for v in s.flatten())))


def test_fbkd_non_local_block_sums_over_all_pairs():
    block, x = NonLocal(4), torch.randn(1, 4, 3, 2)
    torch.nn.init.normal_(block.output.weight)
    q, k, v = (f(x)[0].flatten(1).T for f in (block.query, block.key, block.value))
    rows = [sum((q[i] @ k[j]) * v[j] for j in range(6)) / 6 for i in range(6)]
    added = block.output(torch.stack(rows).T.reshape(1, 2, 3, 2))
    close(block(x), x + added)


def test_fbkd_terms_are_root_mean_squares():
    context = toy_step()
    loss, measured = attach(FBKD(), context), {}
    for n, t in context.teacher_maps.items():
        s = context.student_maps[n]
        adapted = loss.adapters[n](s)
        spatial, channel = (
            sum(x.abs().mean(d, keepdim=True) for x in (adapted, t)) for d in (1, (2, 3))
        )
        masks = [(spatial / 0.5).exp(), (channel / 0.5).exp()]
        masks = [x * x[0].numel() / x.sum(dim=(1, 2, 3), keepdim=True) for x in masks]
        differences = {
            "spatial": loss.spatial_adapters[n](s.abs().mean(1, True)) - t.abs().mean(1, True),
            "channel": loss.channel_adapters[n](s.abs().mean((2, 3), True))
            - t.abs().mean((2, 3), True),
            "feature": (masks[0] * masks[1]).sqrt() * (adapted - t),
            "relation": loss.relation_adapters[n](loss.student_relations[n](s))
            - loss.teacher_relations[n](t),
        }
        for term, x in differences.items():
            power = mean(float(v) ** 2 for v in x.flatten())
            measured.setdefault(f"loss_kd_fbkd_{term}", []).append(math.sqrt(power))
    terms = evaluate(loss, context)
    assert set(terms) == set(measured)
    for term, values in measured.items():
        close(terms[term], mean(values))


def test_general_instances_are_where_the_detectors_disagree():
    context = toy_step(counts=(1, 1))
    ours, theirs = context.student_dense, context.teacher_dense
    sizes = [(64, 64), (30, 50)]  # the second one is padded
    settings = {"num_instances": 3, "nms_threshold": 0.3}
    rois = general_instances(ours, theirs, sizes, **settings, min_box_size=7.0)
    anchors, small = ours.flat_anchors, 0
    for image, (height, width) in enumerate(sizes):
        logits = [x.flat_logits[image].detach() for x in (ours, theirs)]
        deltas = [x.flat_deltas[image].detach() for x in (ours, theirs)]
        score = (logits[1].sigmoid() - logits[0].sigmoid()).abs().amax(1)
        surer = [int(t.max() > s.max()) for s, t in zip(*logits)]
        deltas = torch.stack([deltas[who][a] for a, who in enumerate(surer)])
        boxes = ours.transform.apply_deltas(deltas, anchors).clamp_min(0)
        boxes = boxes.minimum(torch.tensor([width, height, width, height]))
        overlaps = box_iou(boxes, boxes)
        kept = []
        for a in score.argsort(descending=True).tolist():
            x0, y0, x1, y1 = boxes[a].tolist()
            if min(x1 - x0, y1 - y0) < 7:
                small += 1
            elif all(overlaps[a, b] <= 0.3 for b in kept):
                kept.append(a)
        assert len(kept) > 3
        found = {tuple(b) for b in rois[rois[:, 0] == image, 1:].tolist()}
        assert found == {tuple(b) for b in boxes[kept[:3]].tolist()}
    assert small > 3
    none = general_instances(ours, theirs, sizes, **settings, min_box_size=70.0)
    assert none.shape == (0, 5)


@both
def test_gid_without_an_instance_is_zero_with_gradient(one_stage):
    context = toy_step(one_stage=one_stage)
    loss = attach(GID(min_box_size=70.0, pooler_resolution=2), context)
    terms = evaluate(loss, context)
    assert all(term == 0 for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())


@pytest.mark.parametrize(("method", "relu"), [(DeFeat, False), (FGFI, True), (GID, False)])
def test_adapters_are_the_authors(method, relu):
    adapters = attach(method(), toy_step()).adapters.values()
    kinds = [[type(m) for m in adapter.modules() if not list(m.children())] for adapter in adapters]
    assert kinds == [[nn.Conv2d, nn.ReLU] if relu else [nn.Conv2d]] * len(STRIDES)
    convolutions = [m for a in adapters for m in a.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.kernel_size == (3, 3) for conv in convolutions)


@both
def test_gid_compares_features_relations_and_predictions_of_general_instances(one_stage):
    context = toy_step(one_stage=one_stage)
    ours, theirs = context.student_dense, context.teacher_dense
    settings = {"num_instances": 3, "min_box_size": 6.0}
    loss = attach(GID(**settings, pooler_resolution=2), context)
    rois = general_instances(ours, theirs, context.image_sizes, **settings, nms_threshold=0.3)
    s, t, adapted = [], [], []
    for roi in rois:  # boxes of the toys are small enough for the finest level
        image, box = int(roi[0]), roi[None, 1:]
        for maps, values in (
            (context.student_maps["p3"], s),
            (context.teacher_maps["p3"], t),
            (loss.adapters["p3"](context.student_maps["p3"]), adapted),
        ):
            values.append(
                roi_align(maps[image, None], [box], 2, 1 / 8, sampling_ratio=2, aligned=True)
            )
    s, t, adapted = (torch.cat(x).flatten(1) for x in (s, t, adapted))
    terms = evaluate(loss, context)
    close(terms["loss_kd_gid_feature"], mean(float(v) ** 2 for v in (adapted - t).flatten()))
    close(terms["loss_kd_gid_relation"], relations(s.detach(), t, 2))
    classes, boxes = [], []
    for image, a in itertools.product(range(2), range(len(ours.flat_anchors))):
        near = rois[rois[:, 0] == image, 1:]
        if box_iou(near, ours.flat_anchors[a, None]).max() >= 0.5:
            logits = [x.flat_logits[image, a].detach() for x in (ours, theirs)]
            classes.append(row_divergence(*logits, 1.0, one_stage=True))
            gap = ours.flat_deltas[image, a] - theirs.flat_deltas[image, a]
            boxes.append(sum(abs(float(v)) for v in gap))
    assert classes
    close(terms["loss_kd_gid_class"], mean(classes))
    close(terms["loss_kd_gid_box"], mean(boxes))


def test_gid_compares_boxes_of_heads_that_scale_their_predictions_differently():
    context = toy_step(one_stage=True)
    ours, theirs = context.student_dense, context.teacher_dense
    loss = attach(GID(num_instances=3, min_box_size=6.0, pooler_resolution=2), context)
    expected = evaluate(loss, context)["loss_kd_gid_box"]
    theirs.transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    scale = torch.tensor([10.0, 10.0, 5.0, 5.0])
    theirs.deltas = {name: x * scale for name, x in theirs.deltas.items()}  # the same boxes
    theirs.__dict__.pop("flat_deltas")
    assert ours.transform.weights == (1.0, 1.0, 1.0, 1.0)
    close(evaluate(loss, context)["loss_kd_gid_box"], expected)


def test_anchors_at_general_instances():
    anchors = toy_step().student_dense.flat_anchors
    rois = torch.tensor([[0.0, 0, 0, 30, 30], [0, 20, 20, 30, 40], [2, 5, 5, 25, 40]])
    mask = anchors_at(rois, anchors, num_images=3, threshold=0.3)
    for image, a in itertools.product(range(3), range(len(anchors))):
        overlaps = [box_iou(r[None, 1:], anchors[a][None]) for r in rois if r[0] == image]
        assert mask[image, a] == any(v >= 0.3 for v in overlaps)
    assert mask[0].any() and not mask[1].any() and mask[2].any()


def test_feature_richness_weighs_the_scores_of_each_cell():
    s, t = torch.randn(2, 3, 2, 2, 4), torch.randn(2, 3, 2, 2, 4)
    richness = feature_richness(t)
    total = weights = 0.0
    for n, y, x in itertools.product(range(2), range(3), range(2)):
        weight = max(float(v.sigmoid()) for v in t[n, y, x].flatten())
        assert weight == pytest.approx(float(richness[n, y, x]))
        total += weight * row_divergence(s[n, y, x].flatten(), t[n, y, x].flatten(), 1.0, True)
        weights += weight
    close(rich_score_loss(s, t, richness), total / weights)


@both
def test_feature_richness_weighs_the_maps_of_each_cell(one_stage):
    context = toy_step(one_stage=one_stage)
    loss, levels = attach(FeatureRichness(), context), []
    for n, t in context.teacher_maps.items():
        s, logits = loss.adapters[n](context.student_maps[n]), context.teacher_dense.logits[n]
        total = weights = 0.0
        for i, y, x in cells_of(t):
            weight = float(logits[i, y, x].max().sigmoid())
            total += weight * cell_error(s, t, [(i, y, x)])
            weights += weight
        levels.append(total / weights)
    close(evaluate(loss, context)["loss_kd_richness_feature"], mean(levels))


def test_rank_mimicking_compares_distributions_over_each_objects_anchors():
    context = toy_step(counts=(3, 2), bank=toy_bank())
    x, p, gt = context.responses, context.positives, context.ground_truth
    total = objects = 0
    for box, image, label in zip(gt.boxes, gt.image_index, gt.classes):
        rows = [
            i
            for i in range(len(p))
            if torch.equal(p.gt_boxes[i], box) and p.image_index[i] == image
        ]
        if rows:
            t, s = (z[rows, label].detach().sigmoid().softmax(0) for z in (x.teacher, x.student))
            divergence = sum(a * (a.log() - b.log()) for a, b in zip(t, s))
            total += context.response_reliability[rows].mean() * divergence
            objects += 1
    assert objects >= 2
    value = evaluate(RankMimicking(use_reliability=True), context)["loss_kd_rank"]
    close(value, total / objects)


def test_weighted_rank_mimicking_does_not_pull_at_a_student_that_ranks_as_the_teacher():
    context = toy_step(counts=(3, 2), bank=toy_bank())
    context.__dict__["responses"] = replace(
        context.responses, student=context.responses.teacher.clone().requires_grad_()
    )
    value = evaluate(RankMimicking(use_reliability=True), context)["loss_kd_rank"]
    (gradient,) = torch.autograd.grad(value, context.responses.student)
    close(value, 0.0)
    close(gradient, torch.zeros_like(gradient))


def test_grouped_softmax_sums_to_one_in_each_group_whatever_the_size_of_scores():
    scores, group = torch.tensor([500.0, -500, 3, 4, 0]), torch.tensor([2, 2, 0, 0, 3])
    probabilities = grouped_log_softmax(scores, group, 5).exp()
    close(torch.zeros(5).index_add(0, group, probabilities), torch.tensor([1.0, 0, 1, 1, 0]))


def test_prediction_guided_imitation():
    s, t = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    u, v = torch.randn(2, 2, 2, 2, 4), torch.randn(2, 2, 2, 2, 4)
    products = [
        (s[n, :, y, x] - t[n, :, y, x]).square().mean() * (u[n, y, x] - v[n, y, x]).square().mean()
        for n, y, x in cells_of(s)
    ]
    close(prediction_guided_loss(s, t, u, v), mean(products))


def test_prediction_guided_imitation_adapts_each_level():
    context = toy_step()
    loss = attach(PredictionGuidedImitation(), context)
    levels = [
        prediction_guided_loss(
            loss.adapters[n](context.student_maps[n]),
            t,
            context.student_dense.logits[n],
            context.teacher_dense.logits[n],
        )
        for n, t in context.teacher_maps.items()
    ]
    close(evaluate(loss, context)["loss_kd_pfi"], mean(levels))
