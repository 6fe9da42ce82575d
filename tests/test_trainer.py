"""The trainer's checks before a run, and its small helpers."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from globalkd.data import register_datasets
from globalkd.engine.trainer import DistillTrainer, check_classes, fall_back_to_cpu, first_images


@pytest.fixture
def cfg(tiny_cfg):
    cfg = tiny_cfg("rcnn")
    register_datasets(cfg)
    return cfg


def test_equal_class_lists_pass_and_unknown_ones_are_not_compared(cfg):
    check_classes(cfg, [str(i) for i in range(10)])
    check_classes(cfg, [])


@pytest.mark.faults
def test_other_class_lists_are_shown_side_by_side(cfg):
    with pytest.raises(ValueError, match="the teacher has 2: cat, dog.*ALLOW_OTHER_CLASSES"):
        check_classes(cfg, ["cat", "dog"])
    cfg.MODEL.GLOBALKD.TEACHER.ALLOW_OTHER_CLASSES = True
    check_classes(cfg, ["cat", "dog"])


@pytest.mark.faults
def test_another_number_of_classes_is_refused_where_predictions_are_compared(cfg):
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = ["MODEL.ROI_HEADS.NUM_CLASSES", 7]
    with pytest.raises(ValueError, match="teacher has 7 classes and the student 10"):
        DistillTrainer.build_model(cfg)


@pytest.mark.faults
def test_an_empty_dataset_is_named(cfg, tmp_path):
    empty = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    path = tmp_path / "empty.json"
    path.write_text(json.dumps(empty))
    name = f"empty_{tmp_path.name}"
    cfg.DATASETS.COCO = [*cfg.DATASETS.COCO, [name, str(path), str(tmp_path)]]
    cfg.DATASETS.TRAIN = (name,)
    register_datasets(cfg)
    with pytest.raises(ValueError, match=f"DATASETS.TRAIN = .*{name}.*no image to train on"):
        DistillTrainer.build_train_loader(cfg)


@pytest.mark.faults
def test_no_box_of_the_least_size_names_the_key(cfg, batch):
    cfg.MODEL.GLOBALKD.PROTOTYPES.MIN_BOX_SIZE = 500.0
    model = DistillTrainer.build_model(cfg).train()
    with pytest.raises(ValueError, match="MIN_BOX_SIZE = 500 pixels"):
        model.distiller.prepare(model, 0)


def test_the_device_falls_back_only_where_there_is_no_gpu(cfg, monkeypatch, caplog):
    cfg.MODEL.DEVICE = "cuda"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    fall_back_to_cpu(cfg)
    assert cfg.MODEL.DEVICE == "cuda"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fall_back_to_cpu(cfg)
    assert cfg.MODEL.DEVICE == "cpu" and "MODEL.DEVICE is cpu" in caplog.text


def test_the_first_images_are_a_dataset_of_their_own(cfg):
    name = first_images(cfg.DATASETS.TEST[0], 2)
    assert DatasetCatalog.get(name) == DatasetCatalog.get(cfg.DATASETS.TEST[0])[:2]
    whole = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    assert MetadataCatalog.get(name).thing_classes == whole.thing_classes
