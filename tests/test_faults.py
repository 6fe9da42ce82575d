"""The catalogue of bad input: what is wrong, and what the user is told.

Configurations, datasets, images, teachers and prototype files. More cases stand beside the tests of
`datasets`, `teacher`, `prototype_bank`, `trainer` and `hostile_files`.
"""

import json
import logging
import math
import re
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from PIL import Image
from safetensors.torch import save_file

from globalkd import add_globalkd_config, register_datasets
from globalkd.config_reading import load_config
from globalkd.data.config_checks import check_data
from globalkd.data.unreadable import BlankIfUnreadable, readable_images
from globalkd.data.voc import load_voc_folder
from globalkd.engine.hooks import UnreadableImageCount
from globalkd.engine.trainer import DistillTrainer
from globalkd.prototypes import files as prototype_file
from globalkd.prototypes.extraction import ExtractionMapper
from globalkd.teacher.building import load_teacher_weights, teacher_config

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("catalogs")]
KD = "MODEL.GLOBALKD."


# Configurations

#: (content of the file, what is said)
FILES = {
    "misspelt key": (
        "MODEL: {GLOBALKD: {LOSES: []}}",
        r"no key .*\.LOSES\. Did.*GLOBALKD\.LOSSES\?",
    ),
    "misspelt group": (
        "MODEL: {GLOBALKD: {TEACHERS: {WEIGHTS: x}}}",
        r"no key MODEL\.GLOBALKD\.TEACHERS",
    ),
    "misspelt key of Detectron2": (
        "SOLVER: {BASE_LEARNING: 0.1, MAX_ITERS: 3}",
        r"no key SOLVER\.(BASE_LEARNING|MAX_ITERS)",
    ),
    "key without its group": (
        "MODEL: {GLOBALKD: {DBSCAN_EPS: 1.0}}",
        r"Did you mean .*PROTOTYPES\.DBSCAN_EPS\?",
    ),
    "text for a number": ("SOLVER: {BASE_LR: fast}", r"BASE_LR is fast; it must be a float"),
    "number for a switch": ("MODEL: {GLOBALKD: {ENABLED: 1}}", r"ENABLED is 1; it must be a bool"),
    "text for a list": (
        "MODEL: {GLOBALKD: {LOSSES: HintonKD}}",
        r"LOSSES is HintonKD; it must be a list, such as \['GlobalKnowledge'",
    ),
    "number for a group": ("MODEL: {GLOBALKD: 3}", r"GLOBALKD is 3; it must be a group of keys"),
    "number for everything": ("MODEL: 3", "a value stands where a group of keys belongs"),
    "number for a key": ("MODEL: {GLOBALKD: {3: 4}}", "a key is no text"),
    "empty file": ("", "does not hold KEY: VALUE lines"),
    "list": ("- a\n- b", "a value stands where a group of keys belongs"),
    "broken YAML": ("MODEL: {", "it is not YAML.*line 1"),
    "tab": ("MODEL:\n\tX: 1", "it is not YAML.*line 2"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_config_file(tmp_path, case):
    content, said = FILES[case]
    (tmp_path / "my.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"(?s)my.yaml: .*{said}"):
        load_config(str(tmp_path / "my.yaml"))


def test_a_missing_config_file_and_a_missing_base(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config file nowhere.yaml"):
        load_config("nowhere.yaml")
    (tmp_path / "my.yaml").write_text("_BASE_: my.yaml")
    with pytest.raises(ValueError, match="my.yaml: its _BASE_ files name each other in a circle"):
        load_config(str(tmp_path / "my.yaml"))
    (tmp_path / "my.yaml").write_text("_BASE_: nowhere.yaml")
    with pytest.raises(FileNotFoundError, match="no config file .*/nowhere.yaml"):
        load_config(str(tmp_path / "my.yaml"))


@pytest.mark.faults
def test_a_group_that_is_written_twice_is_named_with_its_lines(tmp_path):
    text = "SEED: 1\nMODEL:\n  DEVICE: cpu\nINPUT: {FORMAT: RGB}\nMODEL:\n  MASK_ON: True\n"
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ValueError, match="my.yaml has MODEL twice in one group, in lines 2 and 5"):
        load_config(str(tmp_path / "my.yaml"))


@pytest.mark.faults
def test_a_misspelt_architecture_is_told_the_nearest(tmp_path):
    (tmp_path / "my.yaml").write_text("MODEL: {META_ARCHITECTURE: DistilGeneralizedRCNN}")
    with pytest.raises(ValueError, match="'DistilGeneralizedRCNN'.*mean 'DistillGeneralizedRCNN'"):
        load_config(str(tmp_path / "my.yaml"))


def test_a_whole_number_will_do_for_a_float(tmp_path):
    (tmp_path / "my.yaml").write_text("MODEL: {GLOBALKD: {GLOBAL: {WEIGHT: 7}}}")
    opts = [KD + "FEATURE.WEIGHT", "10", KD + "PROTOTYPES.MIN_BOX_SIZE", 4]
    node = load_config(str(tmp_path / "my.yaml"), opts).MODEL.GLOBALKD
    found = [node.GLOBAL.WEIGHT, node.FEATURE.WEIGHT, node.PROTOTYPES.MIN_BOX_SIZE]
    assert found == [7.0, 10.0, 4.0] and all(isinstance(x, float) for x in found)


OVERRIDES = {
    "flag among the pairs": (["SEED", "1", "--resume"], "--resume stands among the KEY VALUE"),
    "last step": (["SOLVER.STEPS", "(9,)", "SOLVER.MAX_ITER", "9"], r"STEPS \(9,\) contains SOL"),
    "misspelt": ([KD + "GLOBAL.WEIHGT", "1.0"], r"Did you mean MODEL\.GLOBALKD\.GLOBAL\.WEIGHT\?"),
    "of no such name": (
        [KD + "TEACHER.CHECKPOINT", "x"],
        r"TEACHER are CONFIG_FILE, WEIGHTS, OPTS,",
    ),
    "odd number": ([KD + "GLOBAL.WEIGHT"], "list of pairs"),
    "NaN": ([KD + "GLOBAL.WEIGHT", "nan"], "GLOBAL.WEIGHT is nan; it must be a float"),
    "infinite": ([KD + "GLOBAL.WEIGHT", "1e999"], "WEIGHT is inf; .*0 or more and finite"),
    "below a value": ([KD + "GLOBAL.WEIGHT.X", "1"], "a value stands where a group"),
    "base": (["_BASE_", "x"], "_BASE_.*only be used in files"),
    "stop before the warm-up ends": (
        [KD + "WARMUP_ITERS", "9", KD + "STOP_ITER", "8"],
        "STOP_ITER is 8, before the end of the warm-up.*WARMUP_ITERS = 9",
    ),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_the_command_line(tmp_path, case):
    opts, said = OVERRIDES[case]
    (tmp_path / "my.yaml").write_text("SEED: 1")
    with pytest.raises(ValueError, match=said):
        load_config(str(tmp_path / "my.yaml"), opts)


def numbers():
    """Every number that this project adds, with a value that is out of its range."""
    cfg = get_cfg()
    add_globalkd_config(cfg)

    def walk(node, prefix):
        for name, value in node.items():
            if isinstance(value, type(node)):
                yield from walk(value, f"{prefix}{name}.")
            elif type(value) in (int, float):
                yield prefix + name, type(value)(-1)
            elif isinstance(value, list) and value and type(value[0]) is int:
                yield prefix + name, [-1]

    return dict(walk(cfg.MODEL.GLOBALKD, KD))


@pytest.mark.parametrize("key", numbers())
def test_no_number_of_ours_may_be_negative(tmp_path, key):
    (tmp_path / "my.yaml").write_text("SEED: 1")
    value = numbers()[key]
    with pytest.raises(ValueError, match=f"{key} is .*-1.*; it must be"):
        load_config(str(tmp_path / "my.yaml"), [key, value])


CHOICES = {
    "INSTANCES": "some",
    "DECAY": "fast",
    "NON_FINITE_LOSS": "ignore",
    "PROTOTYPES.GENERATOR": "magic",
    "PROTOTYPES.SPACE": "both",
    "PROJECTION.TYPE": "matrix",
    "RELIABILITY.TYPE": "some",
    "GLOBAL.SCOPE": "some",
    "GLOBAL.PENALTY": "l3",
    "RESPONSE.ONE_STAGE": "tanh",
}


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_that_there_is_not_is_named_with_those_that_there_are(tiny_cfg, key):
    cfg = tiny_cfg("rcnn", KD + key, CHOICES[key])
    register_datasets(cfg)
    with pytest.raises(ValueError, match=f"{KD}{key} is '{CHOICES[key]}'; it must be"):
        trainer_to_the_first_step(cfg)


#: Out of range though not negative; and the loss that reads it, where none does by default.
OUT_OF_RANGE = {
    "WEIGHT": (0.0, None),
    "POOLER_RESOLUTION": (0, None),
    "TEACHER.INPUT_SCALE": (0.0, None),
    "PROTOTYPES.NUM": (0, None),
    "PROTOTYPES.DENSITY_PERCENTILE": (100.0, None),
    "PROTOTYPES.DBSCAN_EPS": (0.0, None),
    "PROTOTYPES.RESERVOIR_SIZE": (0, None),
    "FEATURE.ADAPTER_KERNEL": (2, None),
    "RESPONSE.TEMPERATURE": (0.0, None),
    "PIXEL_RELATION.NUM_NODES": ([0], "PixelRelation"),
    "PIXEL_RELATION.STATE_CHANNELS": ([], "PixelRelation"),
    "INSTANCE_RELATION.NUM_LEVELS": (0, "InstanceRelation"),
    "INSTANCE_RELATION.RESOLUTION": (0, "InstanceRelation"),
    "INSTANCE_RELATION.EMBEDDING_CHANNELS": (0, "InstanceRelation"),
    "INSTANCE_FEATURE.NUM_LEVELS": (0, "InstanceFeature"),
    "INSTANCE_FEATURE.RESOLUTION": (0, "InstanceFeature"),
    "HINTON.TEMPERATURE": (0.0, "HintonKD"),
    "RKD.MAX_INSTANCES": (2, "RKD"),
    "DEFEAT.TEMPERATURE": (0.0, "DeFeat"),
    "FGFI.THRESHOLD": (1.0, "FGFI"),
    "FBKD.TEMPERATURE": (0.0, "FBKD"),
    "GID.NUM_INSTANCES": (0, "GID"),
    "GID.NMS_THRESHOLD": (1.1, "GID"),
    "GID.ANCHOR_THRESHOLD": (0.0, "GID"),
    "GID.POOLER_RESOLUTION": (0, "GID"),
    "ICD.NUM_HEADS": (0, "ICD"),
    "ICD.HIDDEN_DIM": (0, "ICD"),
    "ICD.MAX_QUERIES": (0, "ICD"),
    "CWD.TEMPERATURE": (0.0, "CWD"),
    "FGD.TEMPERATURE": (0.0, "FGD"),
    "MGD.MASK_RATIO": (1.0, "MGD"),
    "DKD.TEMPERATURE": (0.0, "DKD"),
}


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused_before_the_first_image_is_read(tiny_cfg, key):
    value, loss = OUT_OF_RANGE[key]
    cfg = tiny_cfg("rcnn", KD + key, value, *([KD + "LOSSES", [loss]] if loss else []))
    with pytest.raises(ValueError, match=re.escape(f"{KD}{key} is {value}; it must be")):
        build_model(cfg)


def trainer_to_the_first_step(cfg):
    model = build_model(cfg)
    with EventStorage(0):
        model.distiller.prepare(model, 0)


def test_a_loss_named_twice(tiny_cfg):
    with pytest.raises(ValueError, match="LOSSES names a loss twice"):
        build_model(tiny_cfg("rcnn", KD + "LOSSES", ["HintonKD", "HintonKD"]))


# Datasets


def coco(folder, change=None, boxes=((1, 1, 20, 20),)):
    """A DATASETS.COCO entry of two images of 40 x 30; `change` breaks the content."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (1, 2)],
        "annotations": [
            {"id": 10 + i, "image_id": 1, "category_id": 7, "bbox": list(box), "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 7, "name": "cat"}],
    }
    if change:
        change(content)
    (folder / "x.json").write_text(json.dumps(content))
    for i in (1, 2):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((30, 40, 3), 50 * i, np.uint8))
    return ["mine", str(folder / "x.json"), str(folder)]


def load(entry):
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.DATASETS.COCO = [entry]
    register_datasets(cfg)
    return DatasetCatalog.get("mine")


def put(part, key, value):
    return lambda content: content[part][-1].update({key: value})


def double(part):
    return lambda content: content[part].append(dict(content[part][0]))


def drop(part, key):
    return lambda content: content[part][0].pop(key)


DATA = {
    "class out of range": (
        put("annotations", "category_id", 8),
        r"1 annotations whose category_id is not in \"categories\"; ids: 10",
    ),
    "annotation id twice": (double("annotations"), '1 ids that stand twice in "annotations": 10'),
    "image id twice": (double("images"), '1 ids that stand twice in "images": 1'),
    "class id twice": (double("categories"), '1 ids that stand twice in "categories": 7'),
    "box of three numbers": (put("annotations", "bbox", [1, 2, 3]), r"bbox is not \[left.*ids: 10"),
    "empty box": (put("annotations", "bbox", []), r"bbox is not \[left, top, width, height\]"),
    "box of text": (put("annotations", "bbox", ["1", "2", "3", "4"]), r"bbox is not \[left"),
    "no box": (drop("annotations", "bbox"), 'entries of "annotations" without "bbox"; ids: 10'),
    "no class": (drop("annotations", "category_id"), 'without "category_id"'),
    "no image id": (drop("annotations", "image_id"), 'without "image_id"'),
    "no file name": (
        drop("images", "file_name"),
        'entries of "images" without "file_name"; ids: 1',
    ),
    "no size": (drop("images", "height"), 'without "height"'),
    "size 0": (put("images", "width", 0), r"height or width is no number above 0: '2.png'"),
    "size of text": (put("images", "width", "40"), "height or width is no number above 0"),
    "path out of the folder": (put("images", "file_name", "../2.png"), "lead out of the image"),
    "list for an id": (put("images", "id", [2]), '1 ids in "images" that are no integers'),
    "fraction for an image id": (
        put("images", "id", 2.5),
        '1 ids in "images" that are no integers or text: 2.5',
    ),
    "text for a class id": (
        put("categories", "id", "7"),
        "1 ids in \"categories\" that are no integers: '7'",
    ),
    "number for a class name": (
        put("categories", "name", 5),
        "1 categories whose name is no text or empty; ids: 7",
    ),
    "empty class name": (
        put("categories", "name", ""),
        "1 categories whose name is no text or empty; ids: 7",
    ),
    "list for an annotation id": (
        put("annotations", "id", [1]),
        'ids in "annotations" that are no integers or text',
    ),
    "list for the image of an annotation": (
        put("annotations", "image_id", [1]),
        "1 annotations whose image_id is no integer or text; ids: 10",
    ),
    "no images": (lambda c: c.pop("images"), r'"images" should be a list of \{id, file_name'),
    "annotations of another form": (
        lambda c: c.update(annotations={"1": []}),
        '"annotations" should be a list',
    ),
    "text for a crowd": (
        put("annotations", "iscrowd", "0"),
        "1 annotations whose iscrowd is not 0 or 1; ids: 10",
    ),
    "nothing for a crowd": (put("annotations", "iscrowd", None), "iscrowd is not 0 or 1; ids: 10"),
    "two crowds in one": (put("annotations", "iscrowd", 2), "iscrowd is not 0 or 1; ids: 10"),
    "ignored annotation": (put("annotations", "ignore", 1), '"ignore".*not supported'),
}


@pytest.mark.parametrize("case", DATA)
def test_a_dataset(tmp_path, case):
    change, said = DATA[case]
    with pytest.raises(ValueError, match=f"DATASETS.COCO: .*x.json.*: .*{said}"):
        load(coco(tmp_path, change))


@pytest.mark.parametrize("crowd", [0, False, 0.0])
def test_what_is_no_crowd_is_trained_on(tmp_path, crowd):
    load(coco(tmp_path, put("annotations", "iscrowd", crowd)))
    cfg = reading_cfg(0)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    (batch,) = (batch for batch, _ in zip(DistillTrainer.build_train_loader(cfg), range(1)))
    assert [len(x["instances"]) for x in batch] == [1, 1]


def test_an_image_that_a_voc_split_names_twice(tmp_path):
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "ImageSets/Main/some.txt").write_text("one\ntwo\none\n")
    with pytest.raises(ValueError, match=r"some.txt names 1 images twice: \['one'\]"):
        load_voc_folder(str(tmp_path), "some", ["cat"])


NAN, INF = math.nan, math.inf
LOST = {
    "no area": (5, 5, 0, 9),
    "negative size": (5, 5, 9, -1),
    "outside": (41, 5, 9, 9),
    "above": (5, -9, 9, 9),
    "NaN": (NAN, 5, 9, 9),
    "infinite": (5, 5, INF, 9),
}


@pytest.mark.parametrize("case", LOST)
def test_a_box_that_nothing_can_be_learnt_from_is_dropped_and_counted(tmp_path, caplog, case):
    with caplog.at_level(logging.WARNING, logger="globalkd"):
        records = load(coco(tmp_path, boxes=[LOST[case], (1, 1, 20, 20), (1, 1, 99, 99)]))
    assert [len(r["annotations"]) for r in records] == [2, 0]  # partly outside is kept
    assert "dropped 1 boxes of no area, outside their image or not finite" in caplog.text


def test_crowds_and_images_without_annotations_are_loaded_and_not_trained_on(tmp_path):
    entry = coco(tmp_path, put("annotations", "iscrowd", 1))
    assert [len(r["annotations"]) for r in load(entry)] == [1, 0]
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.DATASETS.TRAIN = ("mine",)
    with pytest.raises(ValueError, match="gives no image to train on"):
        DistillTrainer.build_train_loader(cfg)


# Images that cannot be read


def break_image(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "other size":
        cv2.imwrite(str(path), np.zeros((9, 9, 3), np.uint8))
    else:
        broken = {"empty": b"", "truncated": content[:-30], "text": b"hello", "head": content[:20]}
        path.write_bytes(broken[how])


BROKEN = ["missing", "empty", "truncated", "text", "head", "other size"]


def reading_cfg(most):
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.DATASETS.TRAIN = ("mine",)
    cfg.DATALOADER.MAX_UNREADABLE_IMAGES = most
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 3
    return cfg


@pytest.mark.parametrize("how", BROKEN)
def test_an_image_that_cannot_be_read_ends_training_with_its_name(tmp_path, how):
    load(coco(tmp_path))
    break_image(tmp_path / "2.png", how)
    with pytest.raises(ValueError, match=r"2.png cannot be read: .*MAX_UNREADABLE_IMAGES is 0"):
        next(iter(DistillTrainer.build_train_loader(reading_cfg(0))))


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_a_wrong_image_folder_is_told_before_anything_is_built(
    tiny_cfg, tmp_path, monkeypatch, key
):
    cfg = tiny_cfg("rcnn", distill=False)
    json_file = cfg.DATASETS.COCO[["TRAIN", "TEST"].index(key)][1]
    cfg.DATASETS.COCO = [*cfg.DATASETS.COCO, ["mine", json_file, str(tmp_path)]]
    cfg.DATASETS[key] = ("mine",)
    register_datasets(cfg)
    count = {"TRAIN": 12, "TEST": 4}[key]
    monkeypatch.setattr(DistillTrainer, "build_model", lambda cfg: pytest.fail("a model is built"))
    with pytest.raises(
        FileNotFoundError,
        match=rf"DATASETS.{key}: 'mine': {count} of {count} .* missing, such as {tmp_path}/0",
    ):
        DistillTrainer(cfg)


def test_image_files_that_may_be_unreadable_may_be_missing(tmp_path):
    load(coco(tmp_path))
    break_image(tmp_path / "2.png", "missing")
    cfg = reading_cfg(1)
    cfg.DATASETS.TEST = ("mine",)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    check_data(cfg)
    cfg.DATALOADER.MAX_UNREADABLE_IMAGES = 0
    for train in (True, False):
        with pytest.raises(FileNotFoundError, match="1 of 2 image files looked for are missing"):
            check_data(cfg, train=train)


@pytest.mark.parametrize("how", BROKEN)
def test_by_key_another_image_takes_its_place_and_it_is_counted(tmp_path, how, caplog):
    load(coco(tmp_path))
    break_image(tmp_path / "2.png", how)
    loader = DistillTrainer.build_train_loader(reading_cfg(1))
    with caplog.at_level(logging.WARNING, logger="globalkd"):
        batches = [batch for batch, _ in zip(loader, range(3))]
    assert {x["image_id"] for batch in batches for x in batch} == {1}
    assert readable_images(loader).unreadable.tolist() == [False, True]
    (warning,) = [x.getMessage() for x in caplog.records if x.name.startswith("globalkd")]
    assert "2.png cannot be read" in warning and "passed over, number 1" in warning


@pytest.mark.parametrize("orientation", [1, 6, 0])
def test_a_turned_photograph_of_another_size_is_told_of_its_tag(tmp_path, orientation):
    load(coco(tmp_path))
    exif = Image.Exif()
    exif[0x0112] = orientation
    size = (40, 30) if orientation == 6 else (30, 40)
    for name in ("1.png", "2.png"):
        Image.new("RGB", size).save(tmp_path / name, exif=exif)
    with pytest.raises(ValueError, match=r"SizeMismatchError: .*got \(30, 40\)") as caught:
        next(iter(DistillTrainer.build_train_loader(reading_cfg(0))))
    hint = "Its EXIF orientation is 6, which Detectron2 applies: annotate the turned image"
    assert (hint in str(caught.value)) == (orientation == 6)


def test_the_images_that_workers_could_not_read_are_counted_in_the_training(tmp_path):
    load(coco(tmp_path))
    break_image(tmp_path / "2.png", "truncated")
    cfg = reading_cfg(1)
    cfg.DATALOADER.NUM_WORKERS = 2
    loader = DistillTrainer.build_train_loader(cfg)
    next(iter(loader))
    hook = UnreadableImageCount()
    with EventStorage(19) as storage:
        hook.trainer = SimpleNamespace(data_loader=loader, iter=19, storage=storage)
        hook.after_step()
    assert storage.history("data/unreadable_images").latest() == 1


def test_too_many_of_them_end_training_all_the_same(tmp_path):
    load(coco(tmp_path))
    for name in ("1.png", "2.png"):
        break_image(tmp_path / name, "text")
    with pytest.raises(ValueError, match="It is number 2 that cannot be read, and .* is 1"):
        next(iter(DistillTrainer.build_train_loader(reading_cfg(1))))
    with pytest.raises(ValueError, match="no image of this orientation can be read"):
        next(iter(DistillTrainer.build_train_loader(reading_cfg(5))))


def test_in_evaluation_it_is_black_and_keeps_its_place(tmp_path):
    records = load(coco(tmp_path))
    break_image(tmp_path / "2.png", "truncated")
    cfg = reading_cfg(1)
    mapper = DatasetMapper(cfg, is_train=False)
    found = BlankIfUnreadable(mapper, 1)(records[1])
    assert (
        found["image_id"] == 2 and found["image"].shape == (3, 30, 40) and not found["image"].any()
    )
    with pytest.raises(ValueError, match="MAX_UNREADABLE_IMAGES is 0"):
        BlankIfUnreadable(mapper, 0)(records[1])


def test_it_gives_no_candidate_for_a_prototype(tmp_path):
    load(coco(tmp_path))
    break_image(tmp_path / "1.png", "truncated")
    record = {"file_name": str(tmp_path / "1.png"), "height": 30, "width": 40, "image_index": 0}
    record.update(boxes=np.ones((2, 4)), classes=np.zeros(2), annotation_ids=np.zeros(2))
    found = ExtractionMapper([], "BGR", 1)(record)
    assert [len(found[k]) for k in ("boxes", "classes", "annotation_ids")] == [0, 0, 0]
    with pytest.raises(ValueError, match="1.png cannot be read"):
        ExtractionMapper([], "BGR")(record)


# Teachers


def test_a_teacher_of_another_architecture(tiny_cfg, tmp_path):
    torch.save({"model": build_model(tiny_cfg("rcnn", distill=False)).state_dict()}, tmp_path / "t")
    teacher = build_model(tiny_cfg("retinanet", distill=False))
    with pytest.raises(ValueError, match=r"fills \d+ of \d+ entries of the teacher. Missing.*head"):
        load_teacher_weights(teacher, str(tmp_path / "t"))


def test_a_teacher_config_with_a_misspelt_key(tmp_path):
    (tmp_path / "t.yaml").write_text("MODEL: {MASK_ONN: False}")
    with pytest.raises(ValueError, match=r"t.yaml: there is no key .*MASK_ONN.*MODEL.MASK_ON\?"):
        teacher_config(str(tmp_path / "t.yaml"))
    with pytest.raises(ValueError, match=r"no key MODEL.MASK_ONN"):
        teacher_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", ["MODEL.MASK_ONN", "1"])


# Prototype files


def test_a_prototype_file_of_a_training_is_refused_at_its_start(tiny_cfg, tmp_path):
    """Of another kind, shape or fingerprint; see `test_prototype_bank`, too."""
    path = str(tmp_path / "p.safetensors")
    cfg = tiny_cfg("rcnn", KD + "PROTOTYPES.FILE", path)
    register_datasets(cfg)
    with pytest.raises(FileNotFoundError, match="There is no prototype file"):
        trainer_to_the_first_step(cfg)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not an intact prototype file: its format is None"):
        trainer_to_the_first_step(cfg)
    prototype_file.write(path, {"x": torch.zeros(1)}, fingerprint={}, counts=[1])
    with pytest.raises(
        ValueError, match="prototypes of another model: .*x: .* in the file, nothing"
    ):
        trainer_to_the_first_step(cfg)
    model = build_model(cfg)
    model.distiller.bank.save(path, {"datasets": ["other"]}, torch.ones(10))
    with pytest.raises(
        ValueError, match=r"made with other settings: .*datasets: \['other'\] in the"
    ):
        trainer_to_the_first_step(cfg)
