"""ICD: its imitation, its queries and its decoder's tasks, on toy steps."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from toy_step import CLASSES, attach, close, evaluate, mean, toy_step

from globalkd.losses import ICD
from globalkd.losses.icd import ConditionalDecoder, conditional_value_loss
from globalkd.losses.icd_conditions import cell_centres, make_queries, sine_embedding


def test_icd_compares_values_where_the_attention_lies():
    s, t, w = torch.randn(3, 6, 2, 4), torch.randn(3, 6, 2, 4), torch.rand(3, 2, 6)
    w[1] = 0  # an image without objects
    terms = []
    for n, u in itertools.product((0, 2), range(2)):
        errors = [
            (F.layer_norm(s[n, c, u], (4,)) - F.layer_norm(t[n, c, u], (4,))).square().mean()
            for c in range(6)
        ]
        terms.append(sum(e * a for e, a in zip(errors, w[n, u])) / w[n, u].sum())
    close(conditional_value_loss(s, t, w), mean(terms))


def test_icd_asks_for_every_annotated_object_and_for_invented_ones():
    context = toy_step(counts=(3, 0, 2))
    queries = make_queries(
        context, num_classes=CLASSES, negative_ratio=2.0, max_queries=8, blur=0.3
    )
    assert queries.real.sum(1).tolist() == [3, 0, 2] and queries.used.sum(1).tolist() == [8, 1, 6]
    close(queries.boxes[queries.real] * 64, context.ground_truth.boxes)
    assert torch.equal(queries.classes[queries.real], context.ground_truth.classes)
    size = queries.boxes[..., 2:] - queries.boxes[..., :2]
    shift = queries.centres - (queries.boxes[..., :2] + size / 2)
    assert (shift.abs() <= 0.3 * size + 1e-6).all() and shift.abs().max() > 0
    close(queries.scatter(torch.arange(1.0, 6))[2, :2], torch.tensor([4.0, 5.0]))


def test_icd_locates_the_sides_in_units_of_the_box():
    context = toy_step(counts=(1, 0))
    queries = make_queries(
        context, num_classes=CLASSES, negative_ratio=1.0, max_queries=9, blur=0.0
    )
    x0, y0, x1, y1 = queries.boxes[0, 0].tolist()
    sides = torch.tensor([(x1 - x0) / 2, (y1 - y0) / 2] * 2)
    predictions = torch.zeros(2, 2, 5)
    predictions[0, 0, 1:] = sides.logit()
    identify, locate = queries.task_losses(predictions)
    close(locate, 0.0)
    close(identify, math.log(2))
    predictions[0, 0, 1] = (sides[0] + 0.1 * (x1 - x0)).logit()
    close(queries.task_losses(predictions)[1], 0.1)


def test_icd_cells_know_their_place_and_padding():
    context = toy_step()
    context.image_sizes = [(64, 64), (32, 48)]
    centres, padding = cell_centres(context)
    close(centres[0, 9], torch.tensor([12 / 64, 12 / 64]))  # p3, second row, second column
    close(centres[1, 64], torch.tensor([8 / 48, 8 / 32]))  # p4, first cell
    inside = (~padding[1, :64]).view(8, 8)
    assert inside[:4, :6].all() and inside.sum() == 24
    assert not padding[0].any()


def test_icd_embedding_tells_places_apart():
    points = torch.rand(50, 2)
    embedding = sine_embedding(points, 16)
    assert embedding.shape == (50, 16) and torch.unique(embedding, dim=0).shape[0] == 50
    assert torch.equal(sine_embedding(points.flip(1), 16), embedding.roll(8, 1))


def test_icd_reaches_the_student_only_from_its_start_on():
    context = toy_step()
    loss = attach(ICD(hidden_dim=8, num_heads=2, start_iter=context.iteration + 1), context)
    sum(evaluate(loss, context).values()).backward()
    assert all(x.grad is None for x in context.student_maps.values())
    assert loss.student_value.weight.grad.any()
    context.iteration += 1
    evaluate(loss, context)["loss_kd_icd"].backward()
    assert all(x.grad.any() for x in context.student_maps.values())


def test_icd_imitation_does_not_train_the_decoder():
    context = toy_step()
    loss = attach(ICD(hidden_dim=8, num_heads=2, start_iter=0), context)
    evaluate(loss, context)["loss_kd_icd"].backward()
    assert all(p.grad is None for p in loss.decoder.parameters())


def test_icd_decoder_attends_head_by_head_and_not_to_padding():
    torch.manual_seed(0)
    decoder = ConditionalDecoder(5, 6, hidden_dim=8, num_heads=2)
    conditions, cells, positions = torch.randn(1, 3, 5), torch.randn(1, 4, 6), torch.randn(1, 4, 8)
    padding = torch.tensor([[False, True, False, False]])
    predictions, attention, value = decoder(conditions, cells, positions, padding)
    condition = decoder.encode(conditions)[0]
    q, v = decoder.query(condition), decoder.value(cells)[0]
    k = decoder.key(cells + decoder.position(positions))[0]
    answers = torch.zeros(3, 8)
    for i, u in itertools.product(range(3), range(2)):
        part = slice(4 * u, 4 * u + 4)
        scores = [0.0 if padding[0, c] else math.exp(q[i, part] @ k[c, part] / 2) for c in range(4)]
        shares = [x / sum(scores) for x in scores]
        close(attention[0, u, i], torch.tensor(shares))
        answers[i, part] = sum(a * v[c, part] for c, a in enumerate(shares))
    decoded = decoder.norms[0](condition + decoder.output(answers))
    decoded = decoder.norms[1](decoded + decoder.feed_forward(decoded))
    close(predictions[0], decoder.predict(decoded))
    close(value[0, 2, 1], v[2, 4:])


@pytest.mark.faults
@pytest.mark.parametrize(("weight", "auxiliary"), [(0.0, 1.0), (3.0, 0.0)])
def test_icd_has_no_half(weight, auxiliary):
    with pytest.raises(ValueError, match=f"ICD.AUXILIARY_WEIGHT is {auxiliary}"):
        ICD(weight=weight, auxiliary_weight=auxiliary)


def test_icd_without_weights_has_no_terms():
    assert not ICD(weight=0.0, auxiliary_weight=0.0).weights
