"""Extraction: which boxes and images take part, and that each row is what it says."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import BoxMode

from globalkd.data import register_datasets
from globalkd.features import InstancePooler, match_levels
from globalkd.prototypes.extraction import (
    ExtractionMapper,
    choose_images,
    extract_features,
    extraction_records,
    usable_boxes,
)
from globalkd.random_state import isolated_rng
from globalkd.teacher.building import build_teacher


def record(*boxes, **extra):
    annotations = [
        {"bbox": [0, 0, w, h], "bbox_mode": BoxMode.XYXY_ABS, "category_id": c, **extra}
        for w, h, c in boxes
    ]
    return {"annotations": annotations}


def test_small_crowded_and_difficult_boxes_are_left_out():
    dicts = [
        record((40, 40, 0), (40, 5, 0)),
        record((40, 40, 1), iscrowd=1),
        record((40, 40, 1), difficult=1),
        record((0, 40, 1)),
        {},
    ]
    table = usable_boxes(dicts, min_box_size=10)
    assert table.classes.tolist() == [0] and table.image_ids.tolist() == [0]
    assert len(usable_boxes([], 1.0).boxes) == 0


def test_boxes_of_every_mode_become_corners():
    modes = (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    box = {"bbox": [3, 5, 20, 30], "category_id": 0}
    table = usable_boxes([{"annotations": [{**box, "bbox_mode": mode} for mode in modes]}], 1.0)
    assert table.boxes.tolist() == [[3, 5, 23, 35], [3, 5, 20, 30], [3, 5, 23, 35]]


def test_boxes_end_at_their_image_as_in_training():
    image = {**record((50, 20, 0), (20, 90, 1)), "width": 30, "height": 40}
    beyond = {"bbox": [-9, 25, 12, 60], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2}
    image["annotations"].append(beyond)
    table = usable_boxes([image, record((50, 20, 0))], 1.0)
    ends = [[0, 0, 30, 20], [0, 0, 20, 40], [0, 25, 3, 40], [0, 0, 50, 20]]
    assert table.boxes.tolist() == ends
    assert usable_boxes([image], 4.0).annotation_ids.tolist() == [0, 1]


def test_every_class_gets_its_images_up_to_the_cap():
    rng = np.random.default_rng(0)
    dicts = [record(*[(9, 9, int(c)) for c in rng.integers(0, 5, 2)]) for _ in range(200)]
    dicts.append(record((9, 9, 7)))
    table = usable_boxes(dicts, 1.0)
    chosen = choose_images(table, max_images_per_class=10, seed=1)
    inside = np.isin(table.image_ids, chosen)
    for c in range(5):
        assert len(np.unique(table.image_ids[inside & (table.classes == c)])) >= 10
    assert 200 in chosen, "a class with one image keeps it"
    assert len(chosen) <= 5 * 10 + 1
    assert np.array_equal(chosen, choose_images(table, max_images_per_class=10, seed=1))
    assert not np.array_equal(chosen, choose_images(table, max_images_per_class=10, seed=2))
    assert len(choose_images(table, max_images_per_class=0, seed=1)) == 201


def test_each_record_holds_its_images_boxes_once():
    dicts = [{"file_name": str(i), **record((9, 9, i % 3), (8, 8, 1))} for i in range(6)]
    table = usable_boxes(dicts, 1.0)
    records = extraction_records(dicts, table, [1, 4])
    assert [r["image_index"] for r in records] == [1, 4]
    assert [r["classes"].tolist() for r in records] == [[1, 1], [1, 1]]
    assert [r["annotation_ids"].tolist() for r in records] == [[0, 1], [0, 1]]


@pytest.fixture
def extracted(tiny_cfg):
    cfg = tiny_cfg("rcnn", distill=False)
    register_datasets(cfg)
    dicts = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    student = build_model(cfg).train()
    teacher = build_teacher(
        cfg.MODEL.GLOBALKD.TEACHER.CONFIG_FILE,
        opts=["MODEL.FPN.OUT_CHANNELS", 64, "MODEL.DEVICE", "cpu"],
        allow_random_weights=True,
    )
    levels = match_levels(student.backbone.output_shape(), teacher.output_shape)
    table = usable_boxes(dicts, 2.0)
    records = extraction_records(dicts, table, choose_images(table, max_images_per_class=0, seed=0))

    def run(**changed):
        settings = {
            "levels": levels,
            "pooler": InstancePooler(3),
            "mapper": ExtractionMapper([], "BGR"),
            **changed,
        }
        return extract_features(student, teacher, records, **settings)

    run.student, run.dicts, run.table = student, dicts, table
    return run


def test_rows_are_the_datasets_boxes_in_both_spaces(extracted):
    features = extracted()
    assert len(features) == len(extracted.table.boxes)
    assert features.student["p2"].shape[1] == 32 and features.teacher["p2"].shape[1] == 64
    for row in (0, len(features) // 2, len(features) - 1):
        image = extracted.dicts[int(features.image_ids[row])]
        annotation = image["annotations"][int(features.annotation_ids[row])]
        assert annotation["category_id"] == features.classes[row]
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        torch.testing.assert_close(features.boxes[row], torch.tensor(box, dtype=torch.float32))


@pytest.mark.faults
def test_a_full_disk_is_told_before_the_pass(extracted, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(OSError, match=f"FEATURE_DIR is {tmp_path}.*MiB cannot.*No space left"):
        extracted(folder=str(tmp_path))


def test_features_in_memory_mapped_files_are_the_same_and_leave_no_file(extracted, tmp_path):
    folder = tmp_path / "features"
    memory, mapped = extracted(), extracted(folder=str(folder))
    for level in memory.levels:
        assert torch.equal(memory.student[level], mapped.student[level])
        assert torch.equal(memory.teacher[level], mapped.teacher[level])
    assert torch.equal(memory.classes, mapped.classes)
    assert list(folder.iterdir()) == []


def test_the_student_comes_back_in_training_and_unchanged(extracted):
    before = {k: v.clone() for k, v in extracted.student.state_dict().items()}
    extracted()
    assert extracted.student.training
    assert all(torch.equal(before[k], v) for k, v in extracted.student.state_dict().items())


def test_a_pass_over_data_does_not_touch_random_states(extracted):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with isolated_rng():
        extracted()
        torch.rand(7)
        np.random.rand()
    assert torch.equal(torch.rand(3), expected)
