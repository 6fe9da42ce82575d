"""Noisy knowledge: kinds of errors, which of them are inherited, and the part as a whole."""

import csv
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2.structures import Boxes, Instances, pairwise_iou

from globalkd.analysis.detection_errors import KINDS, image_errors, inherited, match
from globalkd.analysis.detections import annotated_instances
from globalkd.analysis.noise import count_table, inheritance

sys.path.insert(0, str(ROOT / "tools"))
import analyze

SIZE = (100, 100)


def truth(rows, ignored=()):
    """Annotations from rows of x1, y1, x2, y2, class."""
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    result = Instances(SIZE, gt_boxes=Boxes(rows[:, :4]), gt_classes=rows[:, 4].long())
    result.ignored = torch.tensor([i in ignored for i in range(len(rows))], dtype=torch.bool)
    return result


def found(rows):
    """Detections from rows of x1, y1, x2, y2, class, score."""
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Instances(
        SIZE, pred_boxes=Boxes(rows[:, :4]), pred_classes=rows[:, 4].long(), scores=rows[:, 5]
    )


def random_image(seed):
    rng = np.random.default_rng(seed)

    def boxes(count):
        corner, side = rng.uniform(0, 60, (count, 2)), rng.uniform(10, 40, (count, 2))
        return np.concatenate([corner, corner + side], axis=1)

    annotations = np.c_[boxes(6), rng.integers(0, 2, 6)]
    near = annotations[rng.integers(0, 6, 12), :4] + rng.normal(0, 5, (12, 4))
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    rows = np.concatenate([near, boxes(4)])
    return found(np.c_[rows, rng.integers(0, 2, 16), rng.uniform(0, 1, 16)]), truth(annotations)


def test_every_kind_is_told_from_the_others():
    annotations = truth(
        [[0, 0, 20, 20, 0], [40, 0, 60, 20, 1], [0, 40, 20, 60, 2], [0, 80, 9, 99, 3]]
    )
    detections = found(
        [
            [0, 0, 20, 21, 0, 0.6],  # the annotation's box, but another one scores higher
            [0, 0, 20, 20, 0, 0.9],
            [40, 0, 60, 20, 5, 0.8],  # the right place, another class
            [0, 40, 20, 48, 2, 0.7],  # IoU 0.4
            [80, 80, 99, 99, 0, 0.7],
            [0, 40, 20, 46, 4, 0.7],  # IoU 0.3, and another class
        ]
    )
    kinds, missed = match(detections, annotations)
    assert kinds.tolist() == [
        "duplicate", "correct", "classification", "localisation", "background", "both",
    ]  # fmt: skip
    # Found; misclassified; mislocalised: only the last is missed.
    assert missed.tolist() == [False, False, False, True]
    errors = image_errors(detections, annotations)
    assert sorted(errors.kinds) == sorted(KINDS)
    assert errors.classes[-1] == 3 and np.isnan(errors.scores[-1])


def naive_match(detections, annotations):
    """The same rules, a detection at a time."""
    iou = pairwise_iou(detections.pred_boxes, annotations.gt_boxes).numpy()
    taken, covered, kinds = set(), set(), {}
    for d in sorted(range(len(detections)), key=lambda d: -detections.scores[d]):
        same = (annotations.gt_classes == detections.pred_classes[d]).numpy()
        own, other = iou[d] * same, iou[d] * ~same
        if own.max() >= 0.5:
            kinds[d] = "duplicate" if own.argmax() in taken else "correct"
            taken.add(own.argmax())
            if kinds[d] == "duplicate" and other.max() >= 0.5:
                kinds[d] = "classification"
        elif own.max() >= 0.1:
            kinds[d] = "localisation"
            covered.add(own.argmax())
        elif other.max() >= 0.5:
            kinds[d] = "classification"
        else:
            kinds[d] = "background" if iou[d].max() < 0.1 else "both"
        if kinds[d] == "classification":
            covered.add(other.argmax())
    missed = [g not in taken | covered for g in range(len(annotations))]
    return [kinds[d] for d in range(len(detections))], missed


@pytest.mark.parametrize("seed", range(20))
def test_all_at_once_equals_one_at_a_time(seed):
    detections, annotations = random_image(seed)
    kinds, missed = match(detections, annotations)
    expected = naive_match(detections, annotations)
    assert (kinds.tolist(), missed.tolist()) == expected


def test_the_order_of_detections_does_not_matter():
    detections, annotations = random_image(3)
    order = torch.randperm(len(detections), generator=torch.Generator().manual_seed(0))
    kinds, missed = match(detections, annotations)
    shuffled, still_missed = match(detections[order], annotations)
    assert shuffled.tolist() == kinds[order.numpy()].tolist()
    assert still_missed.tolist() == missed.tolist()


def test_empty_images_are_normal():
    one, nothing = found([[0, 0, 9, 9, 0, 0.9]]), found([])
    assert match(nothing, truth([[0, 0, 9, 9, 0]]))[1].tolist() == [True]
    assert match(one, truth([]))[0].tolist() == ["background"]
    errors = image_errors(nothing, truth([]))
    assert len(errors.kinds) == 0 and len(inherited(errors, errors)) == 0


def test_ignored_annotations_make_no_errors():
    crowd = truth([[0, 0, 50, 50, 0], [60, 60, 90, 90, 1]], ignored=[0])
    kinds, missed = match(found([[10, 10, 20, 20, 3, 0.9], [60, 60, 90, 90, 1, 0.9]]), crowd)
    assert kinds.tolist() == ["ignored", "correct"] and not missed.any()


def test_crowds_and_difficult_objects_are_the_ignored_ones():
    box = {"bbox": [1, 2, 3, 4], "bbox_mode": 1, "category_id": 2}
    flags = [{}, {"iscrowd": 1}, {"difficult": True}, {"iscrowd": 0}]
    record = {"height": 9, "width": 9, "annotations": [{**box, **flag} for flag in flags]}
    annotations = annotated_instances(record)
    assert annotations.ignored.tolist() == [False, True, True, False]
    assert annotations.gt_boxes.tensor[0].tolist() == [1, 2, 4, 6]
    assert len(annotated_instances({**record, "annotations": []})) == 0


def test_only_the_same_error_at_the_same_place_is_inherited():
    annotations = truth([[0, 0, 20, 20, 0]])
    teacher = image_errors(found([[60, 60, 80, 80, 1, 0.9], [0, 0, 20, 20, 0, 0.9]]), annotations)
    right = found([[0, 0, 20, 20, 0, 0.9]])
    for row, expected in [
        ([60, 60, 80, 82, 1, 0.5], [True]),
        ([60, 60, 80, 82, 2, 0.5], [False]),  # another class
        ([30, 60, 50, 80, 1, 0.5], [False]),  # elsewhere
        ([0, 0, 20, 8, 0, 0.5], [False]),  # another kind
    ]:
        student = image_errors(Instances.cat([found([row]), right]), annotations)
        assert inherited(teacher, student).tolist() == expected
    assert inherited(teacher, image_errors(right, annotations)).tolist() == [False]
    nothing = image_errors(found([]), annotations)
    assert inherited(nothing, nothing).tolist() == [True]


def test_counts_add_up_and_a_copy_inherits_everything():
    images = [random_image(seed) for seed in range(5)]
    teacher = [image_errors(*image) for image in images]
    perfect = [image_errors(found([]), truth([])) for _ in images]
    students = {"copy": teacher, "perfect": perfect}
    *rows, total = count_table(teacher, students, inheritance(teacher, students))
    for column in list(total)[1:]:
        assert total[column] == sum(row[column] for row in rows)
    assert total["teacher"] == total["copy"] == total["copy_inherited"] > 0
    assert total["perfect"] == total["perfect_inherited"] == 0


def test_the_part_writes_counts_list_picture_and_text(untrained_run, plain_run):
    settings = ["--threshold", "0.06", "--num-images", "2"]
    analyze.main(["noise", str(untrained_run), "--plain", str(plain_run), *settings])
    folder = untrained_run / "noise"
    counts = list(csv.DictReader((folder / "noise.csv").open()))
    assert [row["kind"] for row in counts] == [*KINDS, "all"]
    total = counts[-1]
    # Students of equal weights make equal errors.
    assert total["plain"] == total["distilled"]
    errors = list(csv.DictReader((folder / "noise_errors.csv").open()))
    assert len(errors) == int(total["teacher"]) > 0
    assert sum(int(row["plain"]) for row in errors) == int(total["plain_inherited"])
    assert f"makes {total['teacher']} errors" in (folder / "summary.txt").read_text()
    assert cv2.imread(str(folder / "noise.png")).std() > 0


@pytest.mark.faults
def test_a_detector_of_other_classes_is_refused(untrained_run, capsys):
    opts = ["--opts", "MODEL.GLOBALKD.TEACHER.OPTS", "['MODEL.ROI_HEADS.NUM_CLASSES', 12]"]
    with pytest.raises(SystemExit):
        analyze.main(["noise", str(untrained_run), *opts])
    assert "The teacher detector has 12 classes and the dataset" in capsys.readouterr().err


def test_overrides_reach_the_plain_run_too(untrained_run, plain_run, scenes):
    """Its data lie where the other run's do now."""
    for folder in (untrained_run, plain_run):
        path = folder / "config.yaml"
        path.write_text(path.read_text().replace(str(scenes), str(scenes / "moved")))
    datasets = repr([["noise_here", str(scenes / "val.json"), str(scenes / "val")]])
    opts = ["DATASETS.COCO", datasets, "DATASETS.TEST", "['noise_here']", "DATASETS.TRAIN", "[]"]
    analyze.main(["noise", str(untrained_run), "--plain", str(plain_run), "--opts", *opts])
    assert (untrained_run / "noise" / "summary.txt").is_file()


@pytest.mark.faults
def test_a_run_without_a_teacher_is_refused(plain_run, capsys):
    with pytest.raises(SystemExit):
        analyze.main(["noise", str(plain_run)])
    assert "does not distil: MODEL.META_ARCHITECTURE is" in capsys.readouterr().err
