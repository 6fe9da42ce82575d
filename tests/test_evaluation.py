"""Evaluators: equal to the reference implementations, and AP by ambiguity."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.evaluation import coco_evaluation as detectron2_coco
from detectron2.structures import Boxes, BoxMode, Instances
from processes import run_in_processes
from pycocotools.cocoeval import COCOeval

from globalkd import add_globalkd_config
from globalkd.data import make_digit_scenes, register_datasets
from globalkd.engine import coco_evaluation
from globalkd.engine.evaluation import build_evaluator
from globalkd.engine.voc_evaluation import VOCFolderEvaluator, voc_average_precision

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("GLOBALKD_TEST_DATA", ROOT.parent / "shared" / "datasets"))
BCCD = ["RBC", "WBC", "Platelets"]
SIZE = 100


pytestmark = pytest.mark.usefixtures("catalogs")


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


def random_boxes(rng, count):
    """(count, 4) XYXY boxes of many sizes inside SIZE x SIZE, whole numbers."""
    corner = rng.integers(0, SIZE - 12, (count, 2))
    side = rng.integers(4, 60, (count, 2))
    return np.concatenate([corner, np.minimum(corner + side, SIZE - 1)], axis=1).astype(float)


def write_coco(folder, *, images=6, classes=3, per_image=5, seed=0, ambiguous=False):
    """Random ground truth with crowds and a class without objects; registers "mine"."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image in range(images):
        for x, y, right, bottom in random_boxes(rng, per_image).tolist():
            number = len(annotations) + 1
            annotation = {
                "id": number,
                "image_id": image + 1,
                "category_id": int(rng.integers(1, classes)),
                "bbox": [x, y, right - x, bottom - y],
                "area": (right - x) * (bottom - y),
                "iscrowd": int(not ambiguous and number % 7 == 0),
            }
            if ambiguous:
                annotation["ambiguity"] = 0.5 if number % 3 == 0 else 0.0
            annotations.append(annotation)
    names = [f"{i:03d}.png" for i in range(images)]
    content = {
        "images": [
            {"id": i + 1, "file_name": name, "width": SIZE, "height": SIZE}
            for i, name in enumerate(names)
        ],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": f"class{i + 1}"} for i in range(classes)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "all.json").write_text(json.dumps(content))
    return ["mine", str(folder / "all.json"), str(folder)]


def write_voc(folder, *, seed=0, images=6):
    """Random VOC folder with difficult objects and a class, "c", that occurs nowhere."""
    rng = np.random.default_rng(seed)
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    for image in range(images):
        text = f"<size><width>{SIZE}</width><height>{SIZE}</height></size>"
        for x, y, right, bottom in random_boxes(rng, 5).astype(int).tolist():
            text += (
                f"<object><name>{'ab'[rng.integers(2)]}</name><pose>x</pose>"
                f"<truncated>0</truncated><difficult>{int(rng.random() < 0.3)}</difficult>"
                f"<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{right}</xmax>"
                f"<ymax>{bottom}</ymax></bndbox></object>"
            )
        (folder / f"Annotations/{image}.xml").write_text(f"<annotation>{text}</annotation>")
        (folder / f"JPEGImages/{image}.jpg").touch()
    (folder / "ImageSets/Main/some.txt").write_text("\n".join(map(str, range(images))))


def detections(boxes, classes, scores):
    instances = Instances((SIZE, SIZE))
    instances.pred_boxes = Boxes(torch.as_tensor(np.array(boxes), dtype=torch.float32))
    instances.pred_classes = torch.as_tensor(np.array(classes), dtype=torch.int64)
    instances.scores = torch.as_tensor(np.array(scores), dtype=torch.float32)
    return instances


def truth_as_detections(record, keep=lambda annotation: True):
    kept = [a for a in record["annotations"] if not a.get("iscrowd") and keep(a)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in kept]
    return detections(
        np.array(boxes, dtype=float).reshape(-1, 4),
        [a["category_id"] for a in kept],
        np.ones(len(kept)),
    )


def noisy_detections(record, rng, num_classes):
    """Some objects moved a little, some missed, some of a wrong class, and false ones.

    Scores have three digits and boxes one, as Detectron2's VOC evaluator writes them.
    """
    truth = truth_as_detections(record)
    boxes = truth.pred_boxes.tensor.numpy() + rng.normal(0, 3, (len(truth), 4))
    boxes = np.concatenate([boxes[rng.random(len(boxes)) < 0.9], random_boxes(rng, 4)])
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    classes = np.concatenate([truth.pred_classes.numpy(), rng.integers(0, num_classes, 8)])
    scores = rng.permutation(np.arange(100, 999))[: len(boxes)] / 1000
    return detections(np.round(boxes, 1), classes[: len(boxes)], scores)


def evaluate(evaluator, name, predict):
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [{"instances": predict(record)}])
    return evaluator.evaluate()["bbox"]


def assert_equal(ours, reference):
    for key, value in reference.items():
        assert ours[key] == pytest.approx(value, abs=1e-9, nan_ok=True), key


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_coco_numbers_equal_pycocotools(cfg, tmp_path, seed):
    register_datasets_of(cfg, coco=[write_coco(tmp_path, seed=seed)])

    def predict(record):
        rng = np.random.default_rng([seed, record["image_id"]])
        return noisy_detections(record, rng, num_classes=3)

    reference = COCOEvaluator("mine", output_dir=None, use_fast_impl=False)
    ours, theirs = build_evaluator(cfg, "mine"), evaluate(reference, "mine", predict)
    result = evaluate(ours, "mine", predict)
    assert 5 < theirs["AP"] < 95 and math.isnan(theirs["AP-class3"])
    assert set(result) == set(theirs)
    assert_equal(result, theirs)


def register_datasets_of(cfg, *, coco=(), voc=()):
    cfg.DATASETS.COCO, cfg.DATASETS.VOC = list(coco), list(voc)
    register_datasets(cfg)


def test_ap_by_ambiguity_is_pycocotools_too(cfg, tmp_path, monkeypatch):
    register_datasets_of(cfg, coco=[write_coco(tmp_path, ambiguous=True)])

    def predict(record):
        return noisy_detections(record, np.random.default_rng(record["image_id"]), num_classes=3)

    fast = evaluate(build_evaluator(cfg, "mine"), "mine", predict)
    monkeypatch.setattr(coco_evaluation, "FasterCOCOeval", COCOeval)
    slow = build_evaluator(cfg, "mine")
    result = evaluate(slow, "mine", predict)
    assert set(result) == set(fast) and {"AP-clean", "AP-ambiguous"} <= set(fast)
    assert_equal(result, fast)


def test_detectron2_is_left_as_it_was(cfg, tmp_path):
    register_datasets_of(cfg, coco=[write_coco(tmp_path)])
    before = detectron2_coco.COCOeval_opt, detectron2_coco.COCOeval
    evaluate(build_evaluator(cfg, "mine"), "mine", truth_as_detections)
    assert (detectron2_coco.COCOeval_opt, detectron2_coco.COCOeval) == before


def test_ground_truth_as_predictions_gives_100_on_digit_scenes(cfg, tmp_path):
    root = make_digit_scenes(tmp_path / "x", num_train=0, num_val=12)
    register_datasets_of(cfg, coco=[["digits", f"{root}/val.json", f"{root}/val"]])
    results = evaluate(build_evaluator(cfg, "digits"), "digits", truth_as_detections)
    for key in ("AP", "AP50", "AP75", "AP-clean", "AP-ambiguous"):
        assert results[key] == pytest.approx(100), key


@pytest.mark.parametrize(("ambiguous", "clean_ap"), [(False, 100), (True, 0)])
def test_detecting_one_subset_gives_100_there_and_0_on_the_other(
    cfg, tmp_path, ambiguous, clean_ap
):
    register_datasets_of(cfg, coco=[write_coco(tmp_path, ambiguous=True)])

    def predict(record):
        return truth_as_detections(record, lambda a: (a["ambiguity"] > 0) == ambiguous)

    results = evaluate(build_evaluator(cfg, "mine"), "mine", predict)
    assert results["AP-clean"] == pytest.approx(clean_ap)
    assert results["AP-ambiguous"] == pytest.approx(100 - clean_ap)
    assert 0 < results["AP"] < 100


def test_false_detections_count_in_both_subsets(cfg, tmp_path):
    register_datasets_of(cfg, coco=[write_coco(tmp_path, ambiguous=True)])

    def predict(record):
        right = truth_as_detections(record)
        wrong = detections([[0, 0, 3, 3]] * 2, [0, 1], [1.0, 1.0])
        right.scores *= 0.5
        return Instances.cat([right, wrong])

    results = evaluate(build_evaluator(cfg, "mine"), "mine", predict)
    assert 0 < results["AP-clean"] < 99 and 0 < results["AP-ambiguous"] < 99


def test_data_without_ambiguity_have_the_usual_results_only(cfg, tmp_path):
    register_datasets_of(cfg, coco=[write_coco(tmp_path)])
    results = evaluate(build_evaluator(cfg, "mine"), "mine", truth_as_detections)
    assert not {"AP-clean", "AP-ambiguous"} & set(results)


def test_all_clean_data_have_no_ambiguous_ap(cfg, tmp_path):
    root = make_digit_scenes(tmp_path / "x", num_train=0, num_val=3, ambiguous_share=0.0)
    register_datasets_of(cfg, coco=[["digits", f"{root}/val.json", f"{root}/val"]])
    results = evaluate(build_evaluator(cfg, "digits"), "digits", truth_as_detections)
    assert results["AP-clean"] == pytest.approx(results["AP"]) == pytest.approx(100)
    assert math.isnan(results["AP-ambiguous"])


@pytest.mark.parametrize("fast", [True, False])
def test_no_detection_at_all_is_ap_0(cfg, tmp_path, monkeypatch, fast):
    if not fast:
        monkeypatch.setattr(coco_evaluation, "FasterCOCOeval", COCOeval)
    register_datasets_of(cfg, coco=[write_coco(tmp_path, ambiguous=True)])

    def predict(record):
        return detections(np.zeros((0, 4)), [], [])

    results = evaluate(build_evaluator(cfg, "mine"), "mine", predict)
    for key in ("AP", "AP50", "AP75", "AP-clean", "AP-ambiguous", "AP-class1"):
        assert results[key] == 0, key


@pytest.mark.parametrize("implementation", [coco_evaluation.FasterCOCOeval, COCOeval])
def test_a_json_without_area_and_iscrowd_is_evaluated(cfg, tmp_path, monkeypatch, implementation):
    monkeypatch.setattr(coco_evaluation, "FasterCOCOeval", implementation)
    entry = write_coco(tmp_path, ambiguous=True)
    content = json.loads(Path(entry[1]).read_text())
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    Path(entry[1]).write_text(json.dumps(content))
    register_datasets_of(cfg, coco=[entry])
    results = evaluate(build_evaluator(cfg, "mine"), "mine", truth_as_detections)
    assert results["AP"] == results["APs"] == results["AP-clean"] == pytest.approx(100)


def change_annotations(entry, change):
    """Change each annotation of a JSON that `write_coco` wrote, by its place."""
    content = json.loads(Path(entry[1]).read_text())
    for i, annotation in enumerate(content["annotations"]):
        change(i, annotation)
    Path(entry[1]).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("area", "warnings"), [("400", 1), ("large", 1), ([], 1), (math.nan, 1), (None, 0)]
)
def test_an_area_that_is_no_number_is_that_of_the_box(cfg, tmp_path, caplog, area, warnings):
    entry = write_coco(tmp_path)
    copy = ["other", str(tmp_path / "other.json"), entry[2]]
    Path(copy[1]).write_text(Path(entry[1]).read_text())
    change_annotations(copy, lambda i, a: a.update(area=area if i % 2 else a["area"]))
    register_datasets_of(cfg, coco=[entry, copy])

    def predict(record):
        return noisy_detections(record, np.random.default_rng(record["image_id"]), num_classes=3)

    expected = evaluate(build_evaluator(cfg, "mine"), "mine", predict)
    assert expected["APs"] > 5 and expected["APm"] > 5 and "no number" not in caplog.text
    assert_equal(evaluate(build_evaluator(cfg, "other"), "other", predict), expected)
    assert caplog.text.count("other: 15 annotations have an area that is no number") == warnings


@pytest.mark.faults
@pytest.mark.parametrize("crowd", ["0", "1", None, 2])
def test_a_crowd_that_is_neither_0_nor_1_is_refused(cfg, tmp_path, crowd):
    """Of a dataset that somebody else registered, too: only the evaluator sees that."""
    entry = write_coco(tmp_path)
    change_annotations(entry, lambda i, a: a.update(iscrowd=crowd if i in (3, 4) else 0))
    register_coco_instances("foreign", {}, *entry[1:])
    with pytest.raises(ValueError, match="'foreign'.*2 annotations whose iscrowd.*ids: 4, 5"):
        build_evaluator(cfg, "foreign")


@pytest.mark.parametrize("implementation", [coco_evaluation.FasterCOCOeval, COCOeval])
def test_a_crowd_may_be_a_boolean(cfg, tmp_path, monkeypatch, implementation):
    monkeypatch.setattr(coco_evaluation, "FasterCOCOeval", implementation)
    entry = write_coco(tmp_path)
    copy = ["other", str(tmp_path / "other.json"), entry[2]]
    Path(copy[1]).write_text(Path(entry[1]).read_text())
    change_annotations(copy, lambda i, a: a.update(iscrowd=bool(a["iscrowd"])))
    register_datasets_of(cfg, coco=[entry, copy])

    def predict(record):
        return noisy_detections(record, np.random.default_rng(record["image_id"]), num_classes=3)

    expected = evaluate(build_evaluator(cfg, "mine"), "mine", predict)
    assert_equal(evaluate(build_evaluator(cfg, "other"), "other", predict), expected)


def test_what_an_earlier_run_converted_is_not_read_again(cfg, tmp_path):
    register_datasets_of(cfg, coco=[write_coco(tmp_path)])
    records = DatasetCatalog.get("mine")
    DatasetCatalog.register("view", lambda: records[:2])
    MetadataCatalog.get("view").set(thing_classes=MetadataCatalog.get("mine").thing_classes)
    stale = tmp_path / "view_coco_format.json"
    stale.write_text('{"images": [], "annotations": [], "categories": []}')
    build_evaluator(cfg, "view", str(tmp_path))
    assert len(json.loads(stale.read_text())["annotations"]) == 10


def test_classes_that_the_dataset_does_not_have_are_left_out(cfg, tmp_path, caplog):
    register_datasets_of(cfg, coco=[write_coco(tmp_path)])

    def with_another_class(record):
        truth = truth_as_detections(record)
        truth.pred_classes[0] = 3
        return truth

    def without_that_one(record):
        return truth_as_detections(record)[1:]

    evaluator = build_evaluator(cfg, "mine")
    expected = evaluate(evaluator, "mine", without_that_one)
    assert "left out" not in caplog.text
    assert_equal(evaluate(evaluator, "mine", with_another_class), expected)
    assert "left out 6 detections of classes that the dataset does not have" in caplog.text


@pytest.mark.parametrize("masked", ["all but one", "none"])
def test_boxes_without_a_mask_do_not_end_an_evaluation_of_masks(cfg, tmp_path, caplog, masked):
    entry = write_coco(tmp_path)
    content = json.loads(Path(entry[1]).read_text())
    for i, annotation in enumerate(content["annotations"]):
        x, y, w, h = annotation["bbox"]
        annotation["iscrowd"] = 0
        if i and masked != "none":
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    Path(entry[1]).write_text(json.dumps(content))
    register_datasets_of(cfg, coco=[entry])
    evaluator = build_evaluator(cfg, "mine")
    evaluator.reset()
    for record in DatasetCatalog.get("mine"):
        truth = truth_as_detections(record)
        truth.pred_masks = torch.zeros(len(truth), SIZE, SIZE, dtype=torch.bool)
        for mask, box in zip(truth.pred_masks, truth.pred_boxes.tensor.int().tolist()):
            mask[box[1] : box[3], box[0] : box[2]] = True
        evaluator.process([record], [{"instances": truth}])
    results = evaluator.evaluate()
    if masked == "none":
        assert list(results) == ["bbox"] and results["bbox"]["AP"] == pytest.approx(100)
        assert "mine has no segmentations" in caplog.text
    else:
        assert results["segm"]["AP"] > 90 and results["bbox"]["AP"] > 90
        assert "left out 1 of 30 annotations" in caplog.text


@pytest.mark.parametrize("implementation", [coco_evaluation.FasterCOCOeval, COCOeval])
@pytest.mark.parametrize("kind", ["from 0", "negative", "text"])
def test_ids_of_annotations_do_not_change_the_numbers(
    cfg, tmp_path, monkeypatch, implementation, kind
):
    monkeypatch.setattr(coco_evaluation, "FasterCOCOeval", implementation)
    new_id = {"from 0": lambda i: i, "negative": lambda i: -1 - i, "text": lambda i: f"box {i}"}
    entry = write_coco(tmp_path, ambiguous=True)
    content = json.loads(Path(entry[1]).read_text())
    for i, annotation in enumerate(content["annotations"]):
        annotation["id"] = new_id[kind](i)
    (tmp_path / "other.json").write_text(json.dumps(content))
    register_datasets_of(cfg, coco=[entry, ["other", str(tmp_path / "other.json"), entry[2]]])

    def predict(record):
        return noisy_detections(record, np.random.default_rng(record["image_id"]), num_classes=3)

    usual, other = build_evaluator(cfg, "mine"), build_evaluator(cfg, "other")
    assert evaluate(other, "other", truth_as_detections)["AP"] == pytest.approx(100)
    assert_equal(evaluate(other, "other", predict), evaluate(usual, "mine", predict))


@pytest.mark.parametrize(
    "new_id",
    [lambda i: 2**53 + i, lambda i: 20230101123456001 + i, lambda i: 2**62 + 7 * i, lambda i: -i],
)
def test_ids_of_images_do_not_change_the_numbers(cfg, tmp_path, new_id):
    """faster-coco-eval reads them as doubles: neighbours from 2^53 on would be one image."""
    entry = write_coco(tmp_path, ambiguous=True)
    content = json.loads(Path(entry[1]).read_text())
    for record in content["images"]:
        record["id"] = new_id(record["id"])
    for annotation in content["annotations"]:
        annotation["image_id"] = new_id(annotation["image_id"])
    (tmp_path / "other.json").write_text(json.dumps(content))
    register_datasets_of(cfg, coco=[entry, ["other", str(tmp_path / "other.json"), entry[2]]])

    def predict(record):
        seed = sum(map(ord, record["file_name"]))
        return noisy_detections(record, np.random.default_rng(seed), num_classes=3)

    usual, other = build_evaluator(cfg, "mine"), build_evaluator(cfg, "other")
    assert evaluate(other, "other", truth_as_detections)["AP"] == pytest.approx(100)
    assert evaluate(other, "other", lambda record: truth_as_detections(record)[:0])["AP"] == 0
    expected = evaluate(usual, "mine", predict)
    assert_equal(evaluate(other, "other", predict), expected)
    assert 5 < expected["AP"] < 95 and "AP-ambiguous" in expected


def test_numbers_of_keypoints_equal_pycocotools(cfg, tmp_path, monkeypatch):
    """And the names of keypoints come from the file: without them no training begins."""
    entry = write_coco(tmp_path)
    content = json.loads(Path(entry[1]).read_text())
    for category in content["categories"]:
        category["keypoints"] = ["nose", "left_eye", "right_eye", "left_out"]
    rng = np.random.default_rng(0)
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        places = rng.uniform((x, y), (x + width, y + height), (4, 2))
        annotation["keypoints"] = np.c_[places, [2, 2, 1, 2]].flatten().tolist()
        annotation["num_keypoints"] = 4
    Path(entry[1]).write_text(json.dumps(content))
    register_datasets_of(cfg, coco=[entry])
    metadata = MetadataCatalog.get("mine")
    assert metadata.keypoint_names == ["nose", "left_eye", "right_eye", "left_out"]
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1] * 4

    def predict(record):
        found = truth_as_detections(record)
        kept = [a for a in record["annotations"] if not a["iscrowd"]]
        rng = np.random.default_rng(record["image_id"])
        places = np.array([a["keypoints"] for a in kept]).reshape(-1, 4, 3)
        places[..., :2] += rng.normal(0, 3, places[..., :2].shape)
        found.pred_keypoints = torch.as_tensor(places, dtype=torch.float32)
        found.scores = torch.as_tensor(rng.random(len(kept)), dtype=torch.float32)
        return found

    def keypoints():
        evaluator = build_evaluator(cfg, "mine")
        evaluate(evaluator, "mine", predict)
        return evaluator._results["keypoints"]

    ours = keypoints()
    monkeypatch.setattr(coco_evaluation, "_Evaluation", COCOeval)
    assert 5 < ours["AP"] < 95
    assert_equal(ours, keypoints())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_voc_numbers_equal_detectron2(cfg, tmp_path, seed):
    write_voc(tmp_path / "voc", seed=seed)
    register_datasets_of(cfg, voc=[["mine", str(tmp_path / "voc"), "some", ["a", "b"]]])

    def predict(record):
        rng = np.random.default_rng([seed, int(record["image_id"])])
        return noisy_detections(record, rng, num_classes=2)

    ours = build_evaluator(cfg, "mine")
    assert isinstance(ours, VOCFolderEvaluator)
    reference = evaluate(PascalVOCDetectionEvaluator("mine"), "mine", predict)
    results = evaluate(ours, "mine", predict)
    assert 5 < reference["AP"] < 95
    for key in ("AP", "AP50", "AP75"):
        assert results[key] == pytest.approx(reference[key], abs=1e-6)


def test_voc_ground_truth_as_predictions_gives_100_and_absent_classes_do_not_count(cfg, tmp_path):
    write_voc(tmp_path / "voc")
    register_datasets_of(cfg, voc=[["mine", str(tmp_path / "voc"), "some", ["c", "a", "b"]]])

    def predict(record):
        wrong = detections([[0, 0, 9, 9], [0, 0, 5, 5]], [0, 3], [0.9, 0.8])  # 3 is no class at all
        return Instances.cat([truth_as_detections(record), wrong])

    results = evaluate(build_evaluator(cfg, "mine"), "mine", predict)
    for key in ("AP", "AP50", "AP75", "AP-a", "AP-b"):
        assert results[key] == pytest.approx(100), key
    assert math.isnan(results["AP-c"])


def test_voc_without_detections_is_ap_0(cfg, tmp_path):
    write_voc(tmp_path / "voc")
    register_datasets_of(cfg, voc=[["mine", str(tmp_path / "voc"), "some", ["a", "b"]]])
    results = evaluate(
        build_evaluator(cfg, "mine"), "mine", lambda record: detections(np.zeros((0, 4)), [], [])
    )
    assert results["AP"] == results["AP50"] == 0


def test_a_second_detection_of_an_object_is_false():
    once = [(np.array([[0.9]]), np.array([0.8]), np.array([False]))]
    twice = [(np.array([[0.9], [0.9]]), np.array([0.7, 0.8]), np.array([False]))]
    both = [*once, (np.array([[0.9], [0.9]]), np.array([0.9, 0.85]), np.array([False]))]
    assert voc_average_precision(once, [0.5]) == 1
    assert voc_average_precision(twice, [0.5, 0.95]).tolist() == [1, 0]
    assert voc_average_precision(both, [0.5]) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_difficult_objects_count_neither_way():
    easy = (np.array([[0.9]]), np.array([0.5]), np.array([False]))
    hard = (np.array([[0.9], [0.8]]), np.array([0.9, 0.8]), np.array([True]))
    assert voc_average_precision([easy, hard], [0.5]) == 1
    assert np.isnan(voc_average_precision([hard], [0.5])).all()


def test_detectron2s_own_voc_datasets_keep_its_evaluator(cfg):
    assert isinstance(build_evaluator(cfg, "voc_2007_test"), PascalVOCDetectionEvaluator)


def _evaluate_half(rank, folder, coco, voc):
    """One of two processes, each with every second image."""
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.OUTPUT_DIR = str(folder)
    register_datasets_of(cfg, coco=[coco], voc=[voc])
    results = []
    for name in (coco[0], voc[0]):
        evaluator = build_evaluator(cfg, name)
        evaluator.reset()
        for record in DatasetCatalog.get(name)[rank::2]:
            evaluator.process([record], [{"instances": truth_as_detections(record)}])
        results.append(evaluator.evaluate())
    return results


@pytest.mark.slow
def test_two_processes_gather_the_predictions_of_both(tmp_path):
    coco = write_coco(tmp_path, ambiguous=True)
    write_voc(tmp_path / "voc")
    voc = ["other", str(tmp_path / "voc"), "some", ["a", "b"]]
    first, second = run_in_processes(_evaluate_half, tmp_path, tmp_path, coco, voc)
    assert [r["bbox"]["AP"] for r in first] == pytest.approx([100, 100])
    assert second == [{}, {}]


@pytest.mark.faults
def test_an_empty_test_dataset_names_the_key(cfg, tmp_path):
    (tmp_path / "voc/ImageSets/Main").mkdir(parents=True)
    for part in ("Annotations", "JPEGImages"):
        (tmp_path / "voc" / part).mkdir()
    (tmp_path / "voc/ImageSets/Main/some.txt").touch()
    coco = write_coco(tmp_path, images=0)
    register_datasets_of(cfg, coco=[coco], voc=[["other", str(tmp_path / "voc"), "some", ["a"]]])
    for name in ("mine", "other"):
        with pytest.raises(ValueError, match=f"DATASETS.TEST: '{name}' has no images"):
            build_evaluator(cfg, name)


@pytest.mark.faults
def test_a_dataset_of_another_kind_is_refused_by_name(cfg):
    with pytest.raises(ValueError, match="DATASETS.TEST: 'ade20k_sem_seg_val'.*'sem_seg'"):
        build_evaluator(cfg, "ade20k_sem_seg_val")


def test_a_coco_dataset_that_somebody_else_registered_is_evaluated_too(cfg, tmp_path):
    _, json_file, folder = write_coco(tmp_path)
    register_coco_instances("foreign", {}, json_file, folder)
    results = evaluate(build_evaluator(cfg, "foreign"), "foreign", truth_as_detections)
    assert results["AP"] == pytest.approx(100)


@pytest.mark.real_data
@pytest.mark.skipif(not (REAL / "bccd").is_dir(), reason="no bccd in GLOBALKD_TEST_DATA")
def test_bccd_ground_truth_as_predictions_gives_100(cfg):
    register_datasets_of(cfg, voc=[["bccd", str(REAL / "bccd"), "test", BCCD]])
    results = evaluate(build_evaluator(cfg, "bccd"), "bccd", truth_as_detections)
    assert results["AP"] == results["AP50"] == results["AP75"] == pytest.approx(100)


@pytest.mark.real_data
@pytest.mark.skipif(not (REAL / "coco_cc").is_dir(), reason="no coco_cc in GLOBALKD_TEST_DATA")
def test_real_coco_numbers_equal_pycocotools(cfg):
    root = REAL / "coco_cc"
    entry = ["cc", str(root / "annotations/instances_val2017.json"), str(root / "val2017")]
    register_datasets_of(cfg, coco=[entry])

    def predict(record):
        return noisy_detections(record, np.random.default_rng(record["image_id"]), num_classes=80)

    reference = evaluate(COCOEvaluator("cc", use_fast_impl=False), "cc", predict)
    assert reference["AP"] > 5
    assert_equal(evaluate(build_evaluator(cfg, "cc"), "cc", predict), reference)
