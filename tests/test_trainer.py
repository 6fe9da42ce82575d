"""The trainer's checks before a run, and its small helpers."""

import copy
import json
import logging
import os
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import NARROW
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import AMPTrainer
from detectron2.engine.hooks import BestCheckpointer
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from globalkd.config_reading import check_config, fall_back_to_cpu, leaves
from globalkd.data import register_datasets
from globalkd.data.registration import first_images
from globalkd.data.resumable_loader import ResumableLoader
from globalkd.engine import trainer as trainer_module
from globalkd.engine.checkpoint import AtomicCheckpointer
from globalkd.engine.launching import held_messages, is_connection_lost
from globalkd.engine.run_checks import (
    check_batch,
    check_device,
    check_evaluations,
    require_output,
    require_start,
    scale_to_processes,
)
from globalkd.engine.trainer import (
    DistillTrainer,
    check_classes,
    check_data,
)

pytestmark = pytest.mark.usefixtures("catalogs")
DIGITS = [str(i) for i in range(10)]
RANDOM_TEACHER = ["MODEL.GLOBALKD.TEACHER.ALLOW_RANDOM_WEIGHTS", True]


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


def write_json(folder, *, classes=DIGITS, images=1):
    """A COCO JSON of empty images; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(images)
        ],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
    }
    (folder / "all.json").write_text(json.dumps(content))
    return str(folder / "all.json")


def add_dataset(cfg, folder, name, key="TEST", **content):
    """Register a dataset of `write_json` and let it be the only one of DATASETS.<key>."""
    path = write_json(folder / name, **content)
    cfg.DATASETS.COCO = [*cfg.DATASETS.COCO, [name, path, str(folder)]]
    cfg.DATASETS[key] = (name,)
    register_datasets(cfg)


@pytest.mark.faults
def test_an_empty_training_set_is_named(cfg, tmp_path):
    add_dataset(cfg, tmp_path, "empty", "TRAIN", images=0)
    with pytest.raises(ValueError, match="DATASETS.TRAIN = .*empty.*no image to train on"):
        DistillTrainer.build_train_loader(cfg)


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Fails where a trainer gets as far as to build its model."""
    monkeypatch.setattr(DistillTrainer, "build_model", lambda cfg: pytest.fail("a model is built"))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("SOLVER.MAX_ITER", 0, "SOLVER.MAX_ITER is 0; it must be 1 or more"),
        ("SOLVER.CHECKPOINT_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD is 0; it must be 1 or more"),
        ("OUTPUT_DIR", "", "OUTPUT_DIR is empty; it must name a folder"),
    ],
)
def test_a_run_without_steps_checkpoints_or_folder_is_refused(
    cfg, nothing_is_built, key, value, said
):
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=said):
        DistillTrainer(cfg)


@pytest.mark.faults
@pytest.mark.parametrize("distill", [True, False])
def test_an_empty_test_set_is_told_before_anything_is_built(
    tiny_cfg, tmp_path, nothing_is_built, distill
):
    cfg = tiny_cfg("rcnn", distill=distill)
    add_dataset(cfg, tmp_path, "empty", images=0)
    with pytest.raises(ValueError, match="DATASETS.TEST: 'empty' has no images"):
        DistillTrainer(cfg)
    check_data(cfg, train=False)  # does not read it
    with pytest.raises(ValueError, match="DATASETS.TEST: 'empty' has no images"):
        DistillTrainer.build_test_loader(cfg, "empty")


@pytest.mark.faults
def test_text_for_image_ids_trains_and_is_not_evaluated(cfg, tmp_path, nothing_is_built):
    add_dataset(cfg, tmp_path, "text")
    path = tmp_path / "text/all.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"image {annotation['image_id']}"
    path.write_text(json.dumps(content))
    assert DatasetCatalog.get("text")
    with pytest.raises(ValueError, match="'text' has . image ids that are no integers .'image "):
        DistillTrainer(cfg)


@pytest.mark.faults
def test_a_damaged_test_set_is_told_before_anything_is_built(cfg, tmp_path, nothing_is_built):
    add_dataset(cfg, tmp_path, "damaged")
    path = tmp_path / "damaged/all.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match="damaged/all.json is not complete JSON"):
        DistillTrainer(cfg)


@pytest.mark.faults
@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_a_misspelt_dataset_is_named_with_the_nearest(tiny_cfg, nothing_is_built, key):
    cfg = tiny_cfg("rcnn")
    register_datasets(cfg)
    name = cfg.DATASETS[key][0]
    cfg.DATASETS[key] = (name + "s",)
    with pytest.raises(ValueError, match=f"DATASETS.{key} names '{name}s'.* mean '{name}'\\?$"):
        DistillTrainer(cfg)


@pytest.mark.faults
@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["cat", "dog"], "has 2: cat, dog"),
        (DIGITS[:8], "has 8: 0, 1, 2, 3, 4, ...; label 8 is 8, nothing"),
        ([*DIGITS[:8], "9", "8"], "label 8 is 8, 9"),
    ],
)
def test_other_classes_in_the_test_set_end_a_plain_run_at_its_start(
    tiny_cfg, tmp_path, nothing_is_built, allowed, classes, said
):
    """ALLOW_OTHER_CLASSES is about the teacher alone."""
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.TEACHER.ALLOW_OTHER_CLASSES", allowed, distill=False)
    add_dataset(cfg, tmp_path, "other", classes=classes)
    for check in (DistillTrainer, partial(check_data, train=False)):
        with pytest.raises(ValueError, match=f"DATASETS.TRAIN and DATASETS.TEST differ: .*{said}"):
            check(cfg)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("kind", "key"),
    [("rcnn", "MODEL.ROI_HEADS.NUM_CLASSES"), ("retinanet", "MODEL.RETINANET.NUM_CLASSES")],
)
@pytest.mark.parametrize("distill", [True, False])
def test_a_detector_of_fewer_classes_than_the_data_is_refused(
    tiny_cfg, nothing_is_built, caplog, kind, key, distill
):
    cfg = tiny_cfg(kind, key, 9, distill=distill)
    register_datasets(cfg)
    with pytest.raises(ValueError, match=f"has 10 classes, but {key} is 9.* Set {key} 10"):
        DistillTrainer(cfg)
    for number, warnings in ((10, 0), (11, 1)):
        cfg.merge_from_list([key, number])
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="globalkd"):
            check_data(cfg)
        assert len([r for r in caplog.records if f"{key} is 11" in r.message]) == warnings


def test_an_evaluation_alone_does_not_need_the_training_set(tiny_cfg, tmp_path):
    cfg = tiny_cfg("rcnn", distill=False)
    path = write_json(tmp_path / "far", classes=["cat"])
    cfg.DATASETS.COCO = [cfg.DATASETS.COCO[1], ["far", path, str(tmp_path / "nowhere")]]
    cfg.DATASETS.TRAIN = ("far",)
    register_datasets(cfg, names=cfg.DATASETS.TEST)
    with pytest.raises(ValueError, match="dataset far has 1: cat"):  # the JSON is here
        check_data(cfg, train=False)
    (tmp_path / "far/all.json").unlink()
    check_data(cfg, train=False)
    with pytest.raises(ValueError, match="DATASETS.TRAIN names 'far', which is not registered"):
        check_data(cfg)


def test_the_trainer_reads_each_dataset_once(tiny_cfg, monkeypatch):
    cfg = tiny_cfg("rcnn", *NARROW, distill=False)
    register_datasets(cfg)
    read, get = Counter(), DatasetCatalog.get

    def counting(name):
        read[name] += 1
        return get(name)

    monkeypatch.setattr(DatasetCatalog, "get", counting)
    DistillTrainer(cfg)
    assert read == {cfg.DATASETS.TRAIN[0]: 1, cfg.DATASETS.TEST[0]: 1}


@pytest.mark.faults
def test_classes_that_only_the_loaded_data_tell_are_compared_too(tiny_cfg, scenes, tmp_path):
    cfg = tiny_cfg("rcnn", *NARROW, distill=False)
    content = json.loads((scenes / "train.json").read_text())
    content["categories"][9]["name"] = "nine"
    (tmp_path / "x.json").write_text(json.dumps(content))
    register_coco_instances("foreign", {}, str(tmp_path / "x.json"), str(scenes / "train"))
    cfg.DATASETS.TRAIN = ("foreign",)
    register_datasets(cfg)
    with pytest.raises(ValueError, match="label 9 is nine, 9"):
        DistillTrainer(cfg)


@pytest.mark.faults
def test_no_box_of_the_least_size_names_the_key(cfg, batch):
    cfg.MODEL.GLOBALKD.PROTOTYPES.MIN_BOX_SIZE = 500.0
    model = DistillTrainer.build_model(cfg).train()
    with pytest.raises(ValueError, match="MIN_BOX_SIZE = 500 pixels"):
        model.distiller.prepare(model, 0)


def test_the_device_falls_back_only_where_there_is_no_gpu(cfg, monkeypatch, caplog):
    cfg.MODEL.DEVICE = "cuda"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    cfg.SOLVER.AMP.ENABLED = True
    fall_back_to_cpu(cfg)
    assert cfg.MODEL.DEVICE == "cuda" and cfg.SOLVER.AMP.ENABLED
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fall_back_to_cpu(cfg)
    assert cfg.MODEL.DEVICE == "cpu" and "MODEL.DEVICE is cpu" in caplog.text
    assert not cfg.SOLVER.AMP.ENABLED and "AMP.ENABLED is False" in caplog.text


def test_a_schedule_for_more_processes_is_scaled_as_a_whole(cfg):
    changed = ["SOLVER.REFERENCE_WORLD_SIZE", 4, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 90]
    changed += ["MODEL.GLOBALKD.WARMUP_ITERS", 10, "MODEL.GLOBALKD.STOP_ITER", 60]
    cfg.merge_from_list(changed)
    scaled = scale_to_processes(cfg, 1)
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.MAX_ITER) == (2, 360)
    before, after = (dict(leaves(x.MODEL.GLOBALKD)) for x in (cfg, scaled))
    counted = {key for key in before if key.endswith("_ITER") or key.endswith("_ITERS")}
    assert {"WARMUP_ITERS", "STOP_ITER", "ICD.START_ITER"} <= counted
    assert all(after[key] == 4 * before[key] > 0 for key in counted)
    assert all(after[key] == before[key] for key in before.keys() - counted)
    assert scale_to_processes(scaled, 1) is scaled and scale_to_processes(cfg, 4) is cfg
    cfg.MODEL.GLOBALKD.STOP_ITER = 1
    assert scale_to_processes(cfg, 16).MODEL.GLOBALKD.STOP_ITER == 1  # 0 would be never
    cfg.SOLVER.IMS_PER_BATCH = 6
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 6; .*REFERENCE_WORLD_SIZE, 4"):
        scale_to_processes(cfg, 1)


def test_the_first_images_are_a_dataset_of_their_own(cfg):
    name = first_images(cfg.DATASETS.TEST[0], 2)
    assert DatasetCatalog.get(name) == DatasetCatalog.get(cfg.DATASETS.TEST[0])[:2]
    whole = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    assert MetadataCatalog.get(name).thing_classes == whole.thing_classes


class OwnEvaluator(DistillTrainer):
    @staticmethod
    def build_evaluator(cfg, dataset_name, output_folder=None):
        raise NotImplementedError


class OwnTest(DistillTrainer):
    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {}


class OwnHook(DistillTrainer):
    def build_hooks(self):
        self.kept = BestCheckpointer(100, self.checkpointer, "bbox/AP")
        return [*super().build_hooks(), self.kept]


def test_a_hook_of_a_subclass_saves_whole_checkpoints(cfg):
    register_datasets(cfg)
    trainer = OwnHook(cfg)
    assert trainer.kept._checkpointer is trainer.checkpointer
    assert isinstance(trainer.checkpointer, AtomicCheckpointer)
    assert {"distiller", "run"} <= set(trainer.checkpointer.checkpointables)


@pytest.mark.parametrize("processes, whole", [(1, True), (2, False)])
def test_what_the_first_process_saves_alone_is_not_resumed_from(cfg, monkeypatch, processes, whole):
    """A hook such as BestCheckpointer has one process's reservoir and statistics."""
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    trainer.checkpointer.save("model_best")
    assert Path(cfg.OUTPUT_DIR, "model_best.pth").exists()
    assert trainer.checkpointer.has_checkpoint() == whole
    monkeypatch.setattr(comm, "gather", lambda x: [x, x])
    trainer.run_state.collect()
    trainer.checkpointer.save("model_0000001")
    assert trainer.checkpointer.get_checkpoint_file().endswith("model_0000001.pth")


@pytest.mark.faults
def test_a_new_run_in_the_folder_of_another_is_not_resumed_as_that_one(cfg, caplog):
    register_datasets(cfg)
    other = DistillTrainer(cfg)
    other.checkpointer.save("model_final", iteration=39)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    assert "holds a run already" in caplog.text and "last_checkpoint is removed" in caplog.text
    assert not trainer.checkpointer.has_checkpoint()
    assert Path(cfg.OUTPUT_DIR, "model_final.pth").exists()


@pytest.mark.faults
def test_a_folder_that_cannot_be_made_names_its_key(tmp_path, cfg, monkeypatch):
    cfg.OUTPUT_DIR = str(tmp_path / "file" / "run")
    require_output(cfg)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="OUTPUT_DIR is '.*run', but .*file is a file"):
        require_output(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "new" / "run")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="OUTPUT_DIR is '.*run', but .* cannot be written to"):
        require_output(cfg)


@pytest.mark.faults
def test_a_batch_of_nothing_is_refused(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 0
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 0; it must be 1 or more"):
        check_batch(cfg, 1)


def test_a_frozen_part_without_weights_is_warned_of(cfg, caplog):
    require_start(cfg)  # trains all of it
    assert not caplog.text
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    require_start(cfg)
    assert "MODEL.WEIGHTS is empty" in caplog.text and "FREEZE_AT 2" in caplog.text


@pytest.mark.faults
@pytest.mark.parametrize("key, what", [("MASK_ON", "masks"), ("KEYPOINT_ON", "keypoints")])
def test_voc_has_neither_masks_nor_keypoints(cfg, key, what):
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("voc_2007_train",), ()
    cfg.MODEL[key] = True
    with pytest.raises(ValueError, match=f"MODEL.{key} is True.*VOC format, which has no {what}"):
        check_data(cfg)


@pytest.mark.faults
def test_there_must_be_something_to_evaluate_a_teacher_on(cfg):
    cfg.DATASETS.TEST, cfg.MODEL.GLOBALKD.TEACHER.EVAL_IMAGES = (), 5
    with pytest.raises(ValueError, match="EVAL_IMAGES is 5, and DATASETS.TEST is empty"):
        DistillTrainer(cfg)


def test_augmentation_in_evaluations_is_not_left_out_without_a_word(cfg, caplog):
    cfg.TEST.AUG.ENABLED = True
    check_evaluations(cfg)
    assert "TEST.AUG.ENABLED has no effect" in caplog.text


def test_the_teacher_is_evaluated_as_a_subclass_evaluates(cfg):
    class Own(DistillTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            return Counted()

    class Counted(DatasetEvaluator):
        def reset(self):
            self.seen = 0

        def process(self, inputs, outputs):
            self.seen += len(outputs)

        def evaluate(self):
            return {"seen": self.seen}

    register_datasets(cfg)
    assert Own(cfg).evaluate_teacher(3) == {"seen": 3}


@pytest.mark.faults
def test_data_that_nothing_here_evaluates_is_told_before_the_training(cfg, monkeypatch):
    (name,) = cfg.DATASETS.TEST
    register_datasets(cfg)
    monkeypatch.setitem(vars(MetadataCatalog.get(name)), "evaluator_type", "lvis")
    with pytest.raises(ValueError, match=f"'{name}' has evaluator_type 'lvis'.*own build_eval"):
        DistillTrainer(cfg)
    OwnEvaluator(cfg)
    OwnTest(cfg)


class OwnLoader(DistillTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg)


class OwnMapper(DistillTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return super().build_train_loader(cfg, mapper=MarkingMapper(cfg))


class MarkingMapper(DatasetMapper):
    def __init__(self, cfg):
        super().__init__(**DatasetMapper.from_config(cfg, True))

    def __call__(self, dataset_dict):
        return {**super().__call__(dataset_dict), "marked": True}


@pytest.mark.parametrize("name", ["rcnn", "resumed"])
def test_a_subclass_may_have_its_own_training_loader(name, tiny_cfg, caplog):
    cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 1, *RANDOM_TEACHER)
    register_datasets(cfg)
    with caplog.at_level(logging.WARNING, logger="globalkd"):
        OwnLoader(cfg).train()
    assert "EXACT_RESUME has no effect: OwnLoader has a training loader of its own" in caplog.text
    if name == "resumed":
        cfg.SOLVER.MAX_ITER = 2
        trainer = OwnLoader(cfg)
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == 1
        trainer.train()


def test_mixed_precision_may_begin_with_a_resume(tiny_cfg):
    """Detectron2 asks a checkpoint for the state of the gradient scaler that is not in it."""
    cfg = tiny_cfg("rcnn")
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    trainer._trainer.iter = 3
    plain = trainer.state_dict()
    trainer._trainer.__class__ = AMPTrainer  # which needs a GPU to be built
    trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    trainer.load_state_dict(copy.deepcopy(plain))
    assert trainer._trainer.grad_scaler.get_scale() == 256.0
    mixed = copy.deepcopy(trainer.state_dict())
    mixed["_trainer"]["grad_scaler"]["scale"] = 32.0
    trainer.load_state_dict(mixed)
    assert trainer._trainer.grad_scaler.get_scale() == 32.0


@pytest.mark.faults
def test_processes_that_talk_by_nccl_cannot_train_on_the_cpu(tiny_cfg, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl")
    with pytest.raises(ValueError, match="MODEL.DEVICE is 'cpu'.* CUDA_VISIBLE_DEVICES="):
        check_device(tiny_cfg("rcnn"))
    check_device(tiny_cfg("rcnn", "MODEL.DEVICE", "cuda"))


@pytest.mark.parametrize(
    "message",
    [
        "[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3",
        "NCCL error in: NCCLUtils.hpp, remote process exited or there was a network error",
        "NCCL communicator was aborted on rank 1.",
    ],
)
def test_a_lost_process_is_known_by_what_the_backends_say(message, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    assert is_connection_lost(RuntimeError(message))
    assert not is_connection_lost(RuntimeError("CUDA error: out of memory"))


def test_a_mapper_of_a_subclass_keeps_the_exact_resume(tiny_cfg, caplog):
    cfg = tiny_cfg("rcnn", "DATALOADER.NUM_WORKERS", 0, *RANDOM_TEACHER)
    register_datasets(cfg)
    with caplog.at_level(logging.WARNING, logger="globalkd"):
        trainer = OwnMapper(cfg)
    assert "EXACT_RESUME" not in caplog.text
    assert isinstance(trainer.data_loader, ResumableLoader)
    assert all(x["marked"] for x in next(iter(trainer.data_loader)))


class TwoBatches(DistillTrainer):
    """As one that accumulates gradients: a step reads more than one batch."""

    def run_step(self):
        next(self._trainer._data_loader_iter)
        super().run_step()


def test_a_step_of_several_batches_resumes_behind_all_of_them(tiny_cfg):
    cfg = tiny_cfg("rcnn", *NARROW, "SOLVER.MAX_ITER", 3, "DATASETS.TEST", (), distill=False)
    register_datasets(cfg)
    TwoBatches(cfg).train()
    trainer = TwoBatches(cfg)
    stream = iter(trainer.data_loader)
    expected = [next(stream) for _ in range(7)][6]
    trainer.resume_or_load(resume=True)
    found = next(iter(trainer.data_loader))
    assert [x["image_id"] for x in found] == [x["image_id"] for x in expected]
    assert all(x["image"].equal(y["image"]) for x, y in zip(found, expected))


@pytest.mark.faults
def test_what_the_training_loader_asserts_is_told_as_it_is(cfg, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("Got an invalid category_id=10 for a dataset of 10 classes")

    monkeypatch.setattr(trainer_module, "build_detection_train_loader", refuse)
    with pytest.raises(ValueError, match=r"DATASETS.TRAIN = \['tiny_.*'\]: Got an invalid"):
        DistillTrainer.build_train_loader(cfg)
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    cfg.SOLVER.IMS_PER_BATCH = 4
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 4; it must be a multiple of .* 3"):
        DistillTrainer.build_train_loader(cfg)


@pytest.mark.faults
def test_what_is_no_device_is_named(cfg):
    cfg.MODEL.DEVICE = "gpu"
    with pytest.raises(ValueError, match="MODEL.DEVICE is 'gpu'.*'cuda'"):
        check_config(cfg)


def test_messages_before_a_runs_log_are_held(caplog):
    project = logging.getLogger("globalkd")
    with held_messages() as early:
        logging.getLogger("globalkd.config_reading").warning("early")
    assert [x.getMessage() for x in early] == ["early"] and "early" not in caplog.text
    project.warning("late")
    assert "late" in caplog.text and len(early) == 1
