"""Planted errors, the scores that should find them, and the audit of a run."""

import base64
import csv
import io
import json
import re
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, scene_datasets
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from globalkd.analysis.annotations import Annotations
from globalkd.analysis.audit import CYAN, LISTS, ORANGE, Audit, annotation_rows, audit_page
from globalkd.analysis.audit_measure import (
    measure_scores,
    measure_unannotated,
    ranking_quality,
)
from globalkd.analysis.audit_scores import (
    best_other_margin,
    class_support,
    unannotated_objects,
)
from globalkd.analysis.planted_errors import BOX_IOU, _iou, plant_errors
from globalkd.data import register_datasets
from globalkd.prototypes.structures import PairedFeatures

sys.path.insert(0, str(ROOT / "tools"))
from analyze import PARTS
from analyze import main as analyze


@pytest.fixture
def planted(scenes, tmp_path):
    """A third of the training annotations changed: file, and what was changed."""
    path = tmp_path / "planted.json"
    shares = dict.fromkeys(("label_share", "box_share", "missing_share"), 0.1)
    return path, plant_errors(scenes / "train.json", path, seed=1, **shares)


def by_id(annotations):
    return {a["id"]: a for a in annotations}


class TestPlanting:
    def test_the_same_seed_gives_the_same_bytes(self, scenes, tmp_path):
        paths = [tmp_path / f"{name}.json" for name in "abc"]
        for path, seed in zip(paths, (1, 1, 2)):
            plant_errors(scenes / "train.json", path, seed=seed)
        first, second, other = (path.read_bytes() for path in paths)
        assert first == second != other

    def test_only_what_is_listed_differs_from_the_truth(self, scenes, planted):
        truth = by_id(json.loads((scenes / "train.json").read_text())["annotations"])
        content = json.loads(planted[0].read_text())
        kept, changed = by_id(content["annotations"]), by_id(planted[1])
        assert content["info"]["planted_errors"] == planted[1]
        assert {a["planted_error"] for a in planted[1]} == {"label", "box", "missing"}
        for number, true in truth.items():
            kind = changed.get(number, {"planted_error": "none"})["planted_error"]
            if kind == "missing":
                assert number not in kept
                continue
            ours = kept[number]
            assert ours["planted_error"] == kind
            assert (ours["category_id"] != true["category_id"]) == (kind == "label")
            assert (ours["bbox"] != true["bbox"]) == (kind == "box")
            if number in changed:
                assert {**changed[number], "planted_error": 0} == {**true, "planted_error": 0}

    def test_moved_boxes_overlap_the_truth_and_lie_in_the_image(self, scenes, planted):
        truth = by_id(json.loads((scenes / "train.json").read_text())["annotations"])
        moved = json.loads(planted[0].read_text())["annotations"]
        boxes = [(a["bbox"], truth[a["id"]]["bbox"]) for a in moved if a["planted_error"] == "box"]
        assert boxes
        for (x, y, width, height), true in boxes:
            assert BOX_IOU[0] <= _iou((x, y, width, height), true) <= BOX_IOU[1]
            assert x >= 0 and y >= 0 and x + width <= 64 and y + height <= 64

    @pytest.mark.faults
    def test_impossible_shares_are_refused(self, scenes, tmp_path):
        with pytest.raises(ValueError, match="at most 1 together"):
            plant_errors(scenes / "train.json", tmp_path / "x.json", label_share=0.7, box_share=0.7)
        content = json.loads((scenes / "train.json").read_text())
        content["categories"] = content["categories"][:1]
        (tmp_path / "one.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="one class"):
            plant_errors(tmp_path / "one.json", tmp_path / "x.json")


def detected(boxes, classes, scores):
    result = Instances((64, 64))
    result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    result.pred_classes = torch.tensor(classes, dtype=torch.int64)
    result.scores = torch.tensor(scores, dtype=torch.float32)
    return result


def annotated(boxes, classes, images):
    none = torch.zeros(len(classes), 1)
    ids = torch.tensor(images)
    boxes = torch.tensor(boxes, dtype=torch.float32)
    return PairedFeatures({"p2": none}, {"p2": none}, torch.tensor(classes), ids, boxes, ids)


class TestScores:
    def test_margin_is_positive_where_another_class_is_better(self):
        values = torch.tensor([[0.2, 0.9, 0.1], [0.2, 0.9, 0.1], [0.0, 0.0, 0.0]])
        margin = best_other_margin(values, torch.tensor([0, 1, 2]))
        assert margin.tolist() == pytest.approx([0.7, -0.7, 0.0])

    def test_one_class_has_no_other(self):
        assert best_other_margin(torch.tensor([[0.5]]), torch.tensor([0])).tolist() == [-0.5]

    def test_support_is_score_times_overlap_of_the_best_detection(self):
        features = annotated(
            [[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]], [0, 0, 1], [0, 1, 1]
        )
        found = [
            detected([[0, 0, 10, 5], [0, 0, 10, 10]], [0, 1], [0.8, 0.3]),  # half the box
            detected([], [], []),
        ]
        support, moved, boxes = class_support(features, found, 3)
        torch.testing.assert_close(support, torch.tensor([[0.4, 0.3, 0], [0, 0, 0], [0, 0, 0]]))
        torch.testing.assert_close(moved, torch.tensor([0.4, 0.0, 0.0]))
        assert boxes[0].tolist() == [0, 0, 10, 5] and boxes[1:].isnan().all()

    def test_a_detection_elsewhere_says_nothing_of_a_box(self):
        features = annotated([[0, 0, 10, 10], [30, 30, 40, 40]], [0, 0], [0, 0])
        support, moved, boxes = class_support(features, [detected([[9, 9, 19, 19]], [0], [1.0])], 1)
        assert support[0] > 0 == support[1] and not moved.any() and boxes.isnan().all()

    def test_an_object_without_annotation_is_listed_once(self):
        truth = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[0.0, 0, 10, 10]])))
        teacher = detected(
            [[0, 0, 10, 10], [20, 20, 30, 30], [20, 20, 30, 29], [50, 50, 60, 60]],
            [0, 1, 2, 0],
            [0.9, 0.8, 0.7, 0.6],
        )
        student = detected([[20, 20, 30, 30], [50, 50, 60, 60]], [1, 1], [0.5, 0.9])
        found = unannotated_objects(truth, teacher, student)
        assert found.pred_classes.tolist() == [1, 0]
        assert found.agreed.tolist() == pytest.approx([0.4, 0.0])  # the other class is no support

    @pytest.mark.parametrize("empty", ["truth", "teacher", "student"])
    def test_an_image_may_lack_anything(self, empty):
        boxes = torch.zeros(0, 4) if empty == "truth" else torch.tensor([[0.0, 0, 10, 10]])
        nothing, one = detected([], [], []), detected([[20, 20, 30, 30]], [1], [0.5])
        found = unannotated_objects(
            Instances((64, 64), gt_boxes=Boxes(boxes)),
            nothing if empty == "teacher" else one,
            nothing if empty == "student" else one,
        )
        assert len(found) == (empty != "teacher")

    def test_ranking_quality_of_perfect_and_reversed_order(self):
        wanted = np.array([True, True, False, False])
        perfect, reverse = (ranking_quality(s, wanted) for s in (4 - np.arange(4), np.arange(4)))
        assert (perfect["auc"], perfect["precision_at_count"]) == (1, 1)
        assert (reverse["auc"], reverse["precision_at_count"]) == (0, 0)


def test_a_perfect_detector_finds_every_planted_error(scenes, planted, tiny_cfg):
    """Detections equal to the truth rank all label and box errors and omissions first."""
    cfg = tiny_cfg("rcnn")
    cfg.DATASETS.COCO = [["perfect", str(planted[0]), str(scenes / "train")], *cfg.DATASETS.COCO]
    register_datasets(cfg)
    wrong = DatasetCatalog.get("perfect")
    right = DatasetCatalog.get(scene_datasets(scenes)[0][0])
    DatasetCatalog.remove("perfect")
    detections = []
    for record in right:
        boxes = [a["bbox"] for a in record["annotations"]]
        boxes = [(x, y, x + w, y + h) for x, y, w, h in boxes]
        classes = [a["category_id"] for a in record["annotations"]]
        detections.append(detected(boxes, classes, [1.0] * len(boxes)))
    rows = [(i, a) for i, record in enumerate(wrong) for a in record["annotations"]]
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for _, a in rows)]
    features = annotated(boxes, [a["category_id"] for _, a in rows], [i for i, _ in rows])
    support, moved, _ = class_support(features, detections, 10)
    scores = {"label": best_other_margin(support, features.classes), "box": moved}
    kinds = np.array([a["planted_error"] for _, a in rows])
    table = measure_scores({k: v.numpy() for k, v in scores.items()}, kinds)
    assert {(r["error"], r["auc"]) for r in table if r["error"] == r["score"]} == {
        ("label", 1.0),
        ("box", 1.0),
    }
    removed = [a for a in planted[1] if a["planted_error"] == "missing"]
    images = {record["image_id"]: i for i, record in enumerate(wrong)}
    listed = []
    for a in removed:
        x, y, w, h = a["bbox"]
        listed.append({"image": images[a["image_id"]], "box": [x, y, x + w, y + h]})
    (row,) = measure_unannotated(listed, wrong, "perfect")
    assert (row["count"], row["precision_at_count"]) == (len(removed), 1.0)


def test_a_wrong_box_is_shown_and_listed_with_the_teachers(tmp_path):
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), np.full((100, 100, 3), 90, np.uint8))
    annotations = Annotations(
        records=[{"file_name": str(path)}],
        rows=[{"id": 71}, {"id": 72}],
        features=annotated([[10, 10, 30, 40], [60, 60, 80, 80]], [1, 0], [0, 0]),
    )
    none = np.zeros(2)
    found = Audit(
        annotations=annotations,
        scores={**{name: none for _, name, _ in LISTS}, "box_teacher": np.array([0.8, 0.0])},
        suggested=np.zeros(2, int),
        teacher_boxes=np.array([[20, 15, 90, 45], [np.nan] * 4]),
        unannotated=[],
    )
    first, second = annotation_rows(found, ["cat", "dog"])
    assert [first[f"teacher_{x}"] for x in ("x", "y", "width", "height")] == [20, 15, 70, 30]
    assert np.isnan(second["teacher_x"])
    page = audit_page(found, ["cat", "dog"], "photos", show=9).write(tmp_path / "audit.html")
    text = page.read_text()
    ((content, caption),) = re.findall(r'base64,([^"]+)"><figcaption>(.*?)<', text)
    assert caption == "dog, 0.80 (annotation 71 in photo.png)"
    assert "as annotated" in text and "as the teacher detects it" in text
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).astype(int)
    for colour, box in ((ORANGE, [10, 10, 30, 40]), (CYAN, [20, 15, 90, 45])):
        y, x = np.nonzero((np.abs(picture - colour) < 60).all(axis=2))
        ratio = (x.max() - x.min()) / (y.max() - y.min())
        assert ratio == pytest.approx((box[2] - box[0]) / (box[3] - box[1]), rel=0.15)


@pytest.mark.slow
def test_the_audit_of_a_run(untrained_run, scenes, planted):
    folder = untrained_run
    entries = [["audited", str(planted[0]), str(scenes / "train")], *scene_datasets(scenes)]
    argv = ["audit", str(folder), "--dataset", "audited", "--show", "3"]
    analyze([*argv, "--opts", "DATASETS.COCO", repr(entries)])
    DatasetCatalog.remove("audited")
    rows = list(csv.DictReader((folder / "audit/audit.csv").open()))
    truth = by_id(json.loads(planted[0].read_text())["annotations"])
    assert len(rows) == len(truth)
    for row in rows:
        box = truth[int(row["annotation"])]["bbox"]
        assert [float(row["x1"]), float(row["y1"])] == pytest.approx(box[:2], abs=0.06)
        assert -1 <= float(row["other_class"]) <= 1 and 0 <= float(row["unexplained"]) <= 1
        assert 0 <= float(row["unseen"]) <= 1 and 0 <= float(row["unreliability"]) <= 1
        # A box of the teacher wherever it has something to say of the annotated one.
        assert float(row["box_teacher"]) == 0 or float(row["teacher_width"]) > 0
    measured = list(csv.DictReader((folder / "audit/measured.csv").open()))
    assert {row["error"] for row in measured} == {"label", "box", "missing", "ambiguous"}
    page = (folder / "audit/audit.html").read_text()
    assert page.count("data:image/jpeg") >= 3 and "://" not in page and "<script" not in page


@pytest.mark.faults
def test_parts_speak_to_the_user(tmp_path, capsys):
    for name in PARTS:
        with pytest.raises(SystemExit) as stopped:
            analyze([name, "--help"])
        assert stopped.value.code == 0 and "usage" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        analyze(["audit", str(tmp_path)])
    assert stopped.value.code == 2 and "not a run's output folder" in capsys.readouterr().err
