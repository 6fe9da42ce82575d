"""The equations of CWD, PKD, FGD, MGD, DKD and ReviewKD against plain references with loops."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from toy_step import CLASSES, STRIDES, attach, close, divergence, evaluate, mean, toy_bank, toy_step

from globalkd.losses import CWD, DKD, FGD, MGD, PKD, ReviewKD
from globalkd.losses.dkd import decouple
from globalkd.losses.fgd import ContextBlock
from globalkd.losses.pkd import correlation_distance
from globalkd.losses.review_kd import hierarchical_loss


def levels_of(loss, context):
    """(name, adapted student map, teacher map) of each level, without gradient."""
    for name, teacher in context.teacher_maps.items():
        yield name, loss.adapters[name](context.student_maps[name]).detach(), teacher


def correlation(x, y):
    a, b = mean(x), mean(y)
    covariance = mean((p - a) * (q - b) for p, q in zip(x, y))
    return covariance / math.sqrt(mean((p - a) ** 2 for p in x) * mean((q - b) ** 2 for q in y))


def channels(maps):
    """The values of each channel in all images."""
    return maps.transpose(0, 1).flatten(1).tolist()


def test_pkd_is_one_minus_the_correlation_of_each_channel():
    context = toy_step()
    loss = attach(PKD(), context)
    expected = [
        mean(1 - correlation(x, y) for x, y in zip(channels(s), channels(t)))
        for _, s, t in levels_of(loss, context)
    ]
    torch.testing.assert_close(
        evaluate(loss, context)["loss_kd_pkd"], torch.tensor(mean(expected)), rtol=1e-3, atol=0
    )


def test_pkd_does_not_see_magnitude_and_offset():
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    scale, offset = torch.tensor([2.0, 30.0, 1e-3]), torch.tensor([5.0, -7.0, 0.0])
    moved = s * scale[:, None, None] + offset[:, None, None]
    torch.testing.assert_close(correlation_distance(moved, t), correlation_distance(s, t))
    close(correlation_distance(-t, t), 2.0)


def test_cwd_compares_where_each_channel_is_active():
    context = toy_step()
    loss = attach(CWD(temperature=2.0), context)
    expected = []
    for _, s, t in levels_of(loss, context):
        rows = [(x / 2).flatten(2).softmax(2).flatten(0, 1).tolist() for x in (t, s)]
        expected.append(4 * mean(divergence(p, q) for p, q in zip(*rows)))
    close(evaluate(loss, context)["loss_kd_cwd"], mean(expected))


def fgd_attention(maps, image):
    """Spatial and channel attention of one image, as lists."""
    magnitude = maps[image].abs()
    spatial = (magnitude.mean(0) / 0.5).exp()
    channel = (magnitude.mean((1, 2)) / 0.5).exp()
    return spatial * spatial.numel() / spatial.sum(), channel * len(channel) / channel.sum()


def test_fgd():
    context = toy_step(counts=(3, 2), bank=toy_bank())
    loss = attach(FGD(use_reliability=True), context)
    gt, weights = context.ground_truth, context.on_ground_truth.reliability
    terms = {name: [] for name in loss.weights}
    for name, s, t in levels_of(loss, context):
        stride, sums = STRIDES[name], dict.fromkeys(("object", "background"), 0.0)
        spatial, channel = [], []
        for image in range(2):
            cells = list(itertools.product(range(t.shape[2]), range(t.shape[3])))
            painted = dict.fromkeys(cells, 0.0)
            for box, i, weight in zip(gt.boxes.tolist(), gt.image_index, weights[name].tolist()):
                touched = [
                    (y, x)
                    for y, x in cells
                    if x * stride < box[2]
                    and (x + 1) * stride > box[0]
                    and y * stride < box[3]
                    and (y + 1) * stride > box[1]
                ]
                for cell in touched if i == image else ():
                    painted[cell] = max(painted[cell], weight / len(touched))
            outside = [cell for cell in cells if painted[cell] == 0]
            (s_space, s_channel), (t_space, t_channel) = (
                fgd_attention(maps, image) for maps in (s, t)
            )
            for y, x in cells:
                gap = (t_channel * (t[image, :, y, x] - s[image, :, y, x]) ** 2).mean()
                sums["object"] += float(painted[y, x] * t_space[y, x] * gap)
                if (y, x) in outside:
                    sums["background"] += float(t_space[y, x] * gap) / len(outside)
            spatial += (s_space - t_space).abs().flatten().tolist()
            channel += (s_channel - t_channel).abs().tolist()
        for part, total in sums.items():
            terms[f"loss_kd_fgd_{part}"].append(total / 2)
        terms["loss_kd_fgd_spatial"].append(mean(spatial))
        terms["loss_kd_fgd_channel"].append(mean(channel))
        ours, theirs = loss.student_contexts[name](s), loss.teacher_contexts[name](t)
        terms["loss_kd_fgd_relation"].append(float((ours - theirs).detach().square().mean()))
    values = evaluate(loss, context)
    for name, levels in terms.items():
        close(values[name], mean(levels))


def test_fgd_context_is_one_vector_for_an_image():
    block, x = ContextBlock(4), torch.randn(2, 4, 3, 2)
    assert torch.equal(block(x), x)  # at first
    torch.nn.init.normal_(block.transform[-1].weight)
    for image in range(2):
        cells = x[image].flatten(1).T
        share = (cells @ block.attend.weight[0, :, 0, 0]).softmax(0)
        added = block.transform(sum(w * cell for w, cell in zip(share, cells)))
        close(block(x)[image], x[image] + added[:, None, None])


def test_fgd_without_relations_has_no_context_blocks():
    loss = attach(FGD(relation_weight=0.0), toy_step(equal=True))
    assert not list(loss.parameters()) and "loss_kd_fgd_relation" not in loss(toy_step(equal=True))


def test_mgd_generates_the_teacher_from_what_is_left_of_the_student():
    context = toy_step()
    loss = attach(MGD(mask_ratio=0.3), context)
    torch.manual_seed(3)
    expected = []
    for name, s, t in levels_of(loss, context):
        kept = torch.rand(len(s), 1, *s.shape[2:]) >= 0.3
        first, _, second = loss.generators[name]
        hidden = F.conv2d(s * kept, first.weight, first.bias, padding=1).clamp_min(0)
        generated = F.conv2d(hidden, second.weight, second.bias, padding=1)
        expected.append(float((generated - t).square().mean().detach()))
    close(evaluate(loss, context, seed=3)["loss_kd_mgd"], mean(expected))


@pytest.mark.parametrize("ratio", [0.0, 0.45, 0.9])
def test_mgd_hides_its_share_of_cells_anew_each_time(ratio, monkeypatch):
    context = toy_step(counts=(1,) * 20)
    loss, kept = attach(MGD(mask_ratio=ratio), context), []
    for generator in loss.generators.values():
        generator.register_forward_hook(
            lambda _module, inputs, _output: kept.append((inputs[0] != 0).all(1).float().flatten())
        )
    loss(context), loss(context)
    visible = torch.cat(kept)  # of 3200 cells; the toys have no zeros of their own
    assert abs(float(visible.mean()) - (1 - ratio)) < 0.04
    assert (ratio == 0) == torch.equal(kept[0], kept[2])


def test_dkd_splits_the_divergence_as_the_paper_does():
    """The whole divergence is TCKD + (1 - p of the teacher's target) NCKD."""
    context = toy_step(one_stage=False)
    x = context.candidates
    terms = evaluate(DKD(temperature=2.0), context)
    target, others, whole = [], [], []
    for s, t, label in zip(x.logits.detach(), x.teacher, x.labels.tolist()):
        q, p = ((z / 2).softmax(0).tolist() for z in (s, t))
        target.append(4 * divergence([p[label], 1 - p[label]], [q[label], 1 - q[label]]))
        rest = [c for c in range(CLASSES + 1) if c != label]
        shares = ([v[c] / (1 - v[label]) for c in rest] for v in (p, q))
        others.append(4 * divergence(*shares))
        whole.append(4 * divergence(p, q))
        assert whole[-1] == pytest.approx(target[-1] + (1 - p[label]) * others[-1], rel=1e-4)
    assert CLASSES in x.labels  # the background is a target like others
    close(terms["loss_kd_dkd_target"], mean(target))
    close(terms["loss_kd_dkd_others"], mean(others))


def test_decoupled_logits():
    logits, labels = torch.randn(5, 4) * 3, torch.tensor([0, 3, 1, 2, 0])
    target, others = decouple(logits, labels, temperature=1.7)
    probability = (logits / 1.7).softmax(1)
    for row, label in enumerate(labels.tolist()):
        close(torch.sigmoid(target[row, 0] / 1.7), probability[row, label])
        kept = [logits[row, c] for c in range(4) if c != label]
        assert torch.equal(others[row], torch.stack(kept))


@pytest.mark.parametrize(("height", "sides"), [(8, (4, 2, 1)), (4, (2, 1)), (2, (1,)), (1, ())])
def test_hierarchical_loss_compares_what_maps_pool_to(height, sides):
    s, t = torch.randn(2, 3, height, 8), torch.randn(2, 3, height, 8)
    total, weights = float((s - t).square().mean()), 1.0
    for weight, side in zip((1 / 2, 1 / 4, 1 / 8), sides):
        gap = s - t
        parts = [
            gap[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean((2, 3))
            for rows in torch.arange(height).tensor_split(side)
            for columns in torch.arange(8).tensor_split(side)
        ]
        total += weight * float(torch.stack(parts).square().mean())
        weights += weight
    close(hierarchical_loss(s, t), total / weights)


def test_review_hands_the_coarser_levels_down():
    context = toy_step()
    loss = attach(ReviewKD(), context)
    fine, coarse = loss.fusions["p3"], loss.fusions["p4"]
    assert coarse.attend is None
    down = coarse.reduce(context.student_maps["p4"])
    own = fine.reduce(context.student_maps["p3"])
    above = down.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    share = fine.attend(torch.cat([own, above], dim=1)).sigmoid()
    mixed = own * share[:, 0, None] + above * share[:, 1, None]
    expected = [
        hierarchical_loss(fine.output(mixed), context.teacher_maps["p3"]),
        hierarchical_loss(coarse.output(down), context.teacher_maps["p4"]),
    ]
    close(evaluate(loss, context)["loss_kd_review"], mean(x.detach() for x in expected))
