"""Registration of datasets by config: what is accepted, dropped, and refused."""

import json
import logging
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets.pascal_voc import load_voc_instances

from globalkd import add_globalkd_config
from globalkd.data import make_digit_scenes, register_datasets
from globalkd.data.class_names import class_names
from globalkd.data.coco_files import read_categories, read_file_names
from globalkd.data.voc import load_voc_folder
from globalkd.engine.coco_evaluation import FastCOCOEvaluator

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("GLOBALKD_TEST_DATA", ROOT.parent / "shared" / "datasets"))
BCCD = ["RBC", "WBC", "Platelets"]


pytestmark = pytest.mark.usefixtures("catalogs")


def config(*, coco=(), voc=()):
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.DATASETS.COCO, cfg.DATASETS.VOC = list(coco), list(voc)
    return cfg


def write_coco(folder, *, boxes, categories=((7, "cat"), (3, "dog")), **extra):
    """One image of 40 x 30 with the given XYWH boxes; returns a DATASETS.COCO entry."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": 5, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [
            {"id": i + 1, "image_id": 5, "category_id": 7, "bbox": box, "area": 1, **extra}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": number, "name": name} for number, name in categories],
    }
    (folder / "all.json").write_text(json.dumps(content))
    return ["mine", str(folder / "all.json"), str(folder)]


def write_voc(folder, objects, *, size=(40, 30), name="one", extension=".png"):
    """One image with objects (class, xmin, ymin, xmax, ymax, more tags); returns an entry."""
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    lines = [
        f"<object><name>{label}</name>{tags}<bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
        f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        for label, x, y, right, bottom, tags in objects
    ]
    width, height = size
    text = f"<annotation><size><width>{width}</width><height>{height}</height></size>"
    (folder / f"Annotations/{name}.xml").write_text(text + "".join(lines) + "</annotation>")
    (folder / "ImageSets/Main/some.txt").write_text(f"{name}\n\n")
    cv2.imwrite(str(folder / f"JPEGImages/{name}{extension}"), np.zeros((30, 40, 3), np.uint8))
    return ["mine", str(folder), "some", ["cat", "dog"]]


def test_coco_classes_stand_in_the_metadata_before_anything_is_loaded(tmp_path):
    register_datasets(config(coco=[write_coco(tmp_path, boxes=[[0, 0, 5, 5]])]))
    metadata = MetadataCatalog.get("mine")
    assert metadata.thing_classes == ["dog", "cat"]  # by category id
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert metadata.evaluator_type == "coco"
    (record,) = DatasetCatalog.get("mine")
    assert record["file_name"] == str(tmp_path / "a.png")
    assert [a["category_id"] for a in record["annotations"]] == [1]


def test_entries_can_come_from_the_command_line(tmp_path):
    cfg = config()
    cfg.merge_from_list(["DATASETS.COCO", str([write_coco(tmp_path, boxes=[])])])
    register_datasets(cfg)
    assert DatasetCatalog.get("mine")[0]["annotations"] == []


def test_registering_twice_changes_nothing(tmp_path, monkeypatch):
    entry = write_coco(tmp_path / "coco", boxes=[])
    voc = ["other", *write_voc(tmp_path / "voc", [])[1:]]
    cfg = config(coco=[entry, entry], voc=[voc])
    register_datasets(cfg)
    before = {name: MetadataCatalog.get(name).as_dict() for name in ("mine", "other")}
    register_datasets(cfg)
    monkeypatch.chdir(tmp_path)
    register_datasets(config(coco=[["mine", "coco/all.json", "coco"]]))
    assert {name: MetadataCatalog.get(name).as_dict() for name in before} == before


@pytest.mark.faults
def test_a_name_cannot_stand_for_two_datasets(tmp_path):
    register_datasets(config(coco=[write_coco(tmp_path / "one", boxes=[])]))
    with pytest.raises(ValueError, match="DATASETS.COCO.*'mine'.*one.*two"):
        register_datasets(config(coco=[write_coco(tmp_path / "two", boxes=[])]))
    with pytest.raises(ValueError, match="DATASETS.VOC.*'mine'"):
        register_datasets(config(voc=[write_voc(tmp_path / "voc", [])]))
    entry = write_coco(tmp_path / "one", boxes=[])
    with pytest.raises(ValueError, match="'coco_2017_val' already is registered outside"):
        register_datasets(config(coco=[["coco_2017_val", *entry[1:]]]))


@pytest.mark.faults
@pytest.mark.parametrize("missing", [1, 2])
def test_a_missing_coco_path_is_named_with_its_entry(tmp_path, missing):
    entry = write_coco(tmp_path, boxes=[])
    entry[missing] = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"DATASETS.COCO: entry \['mine'.*no .*nowhere"):
        register_datasets(config(coco=[entry]))


@pytest.mark.faults
@pytest.mark.parametrize("part", ["Annotations", "JPEGImages", "ImageSets/Main/some.txt"])
def test_a_missing_part_of_a_voc_folder_is_named(tmp_path, part):
    entry = write_voc(tmp_path / "voc", [])
    (tmp_path / "voc" / part).rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=f"DATASETS.VOC.*{part}"):
        register_datasets(config(voc=[entry]))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("coco", "voc", "said"),
    [
        ([["name", "a.json"]], [], "annotation JSON, image folder"),
        (["name"], [], "annotation JSON, image folder"),
        ([], [["name", "folder", "train"]], "class names"),
        ([], [["name", ".", "train", "cat"]], "list of strings"),
        ([], [["name", ".", "train", []]], "list of strings"),
        ([], [["name", ".", "train", [1, 2]]], "list of strings"),
        ([], [["name", ".", "train", ["cat", "cat"]]], "twice"),
    ],
)
def test_an_entry_of_another_form_is_shown_with_the_right_one(coco, voc, said):
    cfg = config(coco=coco, voc=voc)
    for read in (register_datasets, lambda cfg: class_names(cfg, "name")):
        with pytest.raises(ValueError, match=f"DATASETS.*{said}"):
            read(cfg)


@pytest.mark.faults
@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"categories": []}', '{"categories": ["a"]}', '{"categories": 5}']
)
def test_a_json_without_categories_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="DATASETS.COCO.*x.json"):
        register_datasets(config(coco=[["mine", str(tmp_path / "x.json"), str(tmp_path)]]))
    assert "mine" not in DatasetCatalog


@pytest.mark.faults
def test_a_truncated_json_is_named_on_loading(tmp_path):
    content = '{"categories": [{"id": 1, "name": "a"}], "images": [{"id": 1'
    (tmp_path / "x.json").write_text(content)
    register_datasets(config(coco=[["mine", str(tmp_path / "x.json"), str(tmp_path)]]))
    with pytest.raises(ValueError, match="x.json is not complete JSON"):
        DatasetCatalog.get("mine")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("last", [True, False])
def test_categories_are_found_wherever_they_stand(tmp_path, indent, last):
    categories = [{"id": i, "name": f"Größe {i}"} for i in range(3000)]  # more than one window
    content = {"info": {"description": 'says "categories": [1]'}, "images": []}
    content = {**content, "categories": categories} if last else {"categories": categories}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert read_categories(str(path)) == categories
    assert read_file_names(str(path)) == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_changes_nothing(tmp_path, encoding):
    """As editors and scripts on Windows write it."""
    entry = write_coco(tmp_path / "coco", boxes=[[0, 0, 5, 5]], categories=[(7, "Bär")])
    content = json.dumps(json.loads(Path(entry[1]).read_text()), ensure_ascii=False)
    Path(entry[1]).write_text(content, encoding=encoding)
    register_datasets(config(coco=[entry]))
    (record,) = DatasetCatalog.get("mine")
    assert len(record["annotations"]) == 1
    assert MetadataCatalog.get("mine").thing_classes == ["Bär"]
    assert len(FastCOCOEvaluator("mine")._coco_api.anns) == 1


def test_a_voc_split_may_begin_with_a_byte_order_mark(tmp_path):
    register_datasets(config(voc=[write_voc(tmp_path, [("cat", 5, 5, 9, 9, "")])]))
    (tmp_path / "ImageSets/Main/some.txt").write_text("one\r\n", encoding="utf-8-sig")
    path = tmp_path / "Annotations/one.xml"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    (record,) = DatasetCatalog.get("mine")
    assert record["image_id"] == "one" and len(record["annotations"]) == 1


def test_a_nested_key_of_the_same_name_is_not_taken_for_the_categories(tmp_path):
    nested = [{"id": 9, "name": "wrong"}]
    content = {"images": [{"categories": nested}], "categories": [{"id": 1, "name": "right"}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert read_categories(str(tmp_path / "x.json")) == [{"id": 1, "name": "right"}]


def test_file_names_are_read_without_the_rest(tmp_path):
    images = [{"file_name": f"{i}.png"} for i in range(5000)]  # more than one window
    content = {
        "images": [*images, {}, 3, {"file_name": "../x.png"}],
        "annotations": "not looked at",
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    assert read_file_names(str(path)) == [f"{i}.png" for i in range(5000)]
    for content in ('{"annotations": []}', '{"images": [', '{"images": 5}', ""):
        path.write_text(content)
        assert read_file_names(str(path)) == []


def test_annotations_keep_their_ids_and_those_of_categories_are_no_news(tmp_path, caplog):
    boxes = [[0, 0, 5, 5], [50, 50, 5, 5], [9, 9, 5, 5]]
    register_datasets(config(coco=[write_coco(tmp_path, boxes=boxes)]))
    (record,) = DatasetCatalog.get("mine")
    assert [(a["id"], a["category_id"]) for a in record["annotations"]] == [(1, 1), (3, 1)]
    assert "Category ids" not in caplog.text and "dropped 1 boxes" in caplog.text
    logging.getLogger("detectron2.data.datasets.coco").warning(
        "Category ids in annotations are not"
    )
    assert "Category ids" in caplog.text, "the filter stays"


def test_boxes_of_no_area_or_outside_the_image_are_dropped_and_counted(tmp_path, caplog):
    kept = [[0, 0, 5, 5], [38, 28, 10, 10], [-4, -4, 5, 5], [35, 25, 6, 6]]
    lost = [[3, 3, 0, 5], [3, 3, 5, -1], [41, 3, 5, 5], [3, -9, 5, 9], [3, float("nan"), 5, 5]]
    register_datasets(config(coco=[write_coco(tmp_path, boxes=kept + lost)]))
    with caplog.at_level(logging.WARNING, logger="globalkd"):
        (record,) = DatasetCatalog.get("mine")
    assert [a["bbox"] for a in record["annotations"]] == kept
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("globalkd")]
    assert [x.split(", ")[0] for x in ours] == [
        "mine: dropped 5 boxes of no area",
        "mine: 2 of 9 boxes reach more than a pixel beyond their image",
    ]
    assert all(x.endswith(f"in 1 images: {tmp_path}/a.png") for x in ours)


@pytest.mark.parametrize("boxes, warned", [([[0.1, 0.2, 0.5, 0.9]], True), ([[3, 3, 1, 9]], False)])
def test_boxes_that_are_fractions_of_the_image_are_warned_of(tmp_path, caplog, boxes, warned):
    register_datasets(config(coco=[write_coco(tmp_path, boxes=boxes)]))
    with caplog.at_level(logging.WARNING, logger="globalkd"):
        assert len(DatasetCatalog.get("mine")[0]["annotations"]) == 1
    assert ("Are they fractions of the image?" in caplog.text) == warned


def write_shapes(folder, shapes):
    """`write_coco` with an annotation of each segmentation, all with the same box."""
    entry = write_coco(folder, boxes=[[5, 5, 9, 9]] * len(shapes))
    content = json.loads((folder / "all.json").read_text())
    for annotation, shape in zip(content["annotations"], shapes):
        annotation["segmentation"] = shape
    (folder / "all.json").write_text(json.dumps(content))
    return entry


TRIANGLE = [5, 5, 14, 5, 14, 14]
UNUSABLE = [[[]], [[5, 5, 14, 14]], [[5, 5, 14, 5, 14, 14, 5]], TRIANGLE, {"size": [30, 40]}, "x"]


def test_an_unusable_segmentation_does_not_cost_the_box(tmp_path, caplog):
    usable = [[TRIANGLE], [[], TRIANGLE], [], {"size": [30, 40], "counts": [0, 20, 1180]}]
    register_datasets(config(coco=[write_shapes(tmp_path, UNUSABLE + usable)]))
    with caplog.at_level(logging.WARNING, logger="globalkd"):
        (record,) = DatasetCatalog.get("mine")
    assert [a["bbox"] for a in record["annotations"]] == [[5, 5, 9, 9]] * 10
    shapes = [a.get("segmentation") for a in record["annotations"]]
    assert shapes[:9] == [None] * 6 + [[TRIANGLE], [TRIANGLE], None] and "counts" in shapes[9]
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("globalkd")]
    assert "mine: left out 6 segmentations" in warning and "boxes are kept" in warning


def test_where_masks_are_trained_detectron2_drops_it_with_its_box(tmp_path):
    cfg = config(coco=[write_shapes(tmp_path, [[[]], [TRIANGLE]])])
    cfg.MODEL.MASK_ON = True
    register_datasets(cfg)
    (annotation,) = DatasetCatalog.get("mine")[0]["annotations"]
    assert annotation["segmentation"] == [TRIANGLE]


def test_where_masks_are_trained_a_box_without_one_is_left_out_and_counted(tmp_path, caplog):
    entry = write_shapes(tmp_path, [[], [TRIANGLE], None])
    content = json.loads(Path(entry[1]).read_text())
    del content["annotations"][2]["segmentation"]
    Path(entry[1]).write_text(json.dumps(content))
    cfg = config(coco=[entry])
    cfg.MODEL.MASK_ON = True
    register_datasets(cfg)
    (annotation,) = DatasetCatalog.get("mine")[0]["annotations"]
    assert annotation["segmentation"] == [TRIANGLE]
    assert "mine: left out 2 of 3 annotations that have no segmentation" in caplog.text


def trained_on(record):
    """The instances of a record in a training that resizes its image from 40 x 30 to 25 x 19."""
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.Resize((19, 25))],
        image_format="BGR",
        use_instance_mask=any("segmentation" in a for a in record["annotations"]),
    )
    return mapper(record)["instances"]


def test_boxes_and_polygons_of_whole_numbers_keep_the_fractions_of_a_resized_image(tmp_path):
    """Also where another coordinate of the file is a fraction already."""
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((30, 40, 3), np.uint8))
    entry = write_shapes(tmp_path, [[TRIANGLE], [[5.5, *TRIANGLE[1:]]]])
    cfg = config(coco=[entry])
    cfg.MODEL.MASK_ON = True
    register_datasets(cfg)
    instances = trained_on(DatasetCatalog.get("mine")[0])
    scale = np.array([25 / 40, 19 / 30])
    expected = np.array([5, 5, 14, 14]) * np.tile(scale, 2)
    for box in instances.gt_boxes.tensor.numpy():
        np.testing.assert_allclose(box, expected, rtol=1e-6)
    ((first,), (second,)) = instances.gt_masks.polygons
    np.testing.assert_allclose(first.reshape(3, 2), np.reshape(TRIANGLE, (3, 2)) * scale)
    np.testing.assert_allclose(second[1:], first[1:])


def test_a_tiny_box_of_whole_numbers_is_not_lost_in_a_smaller_image(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((30, 40, 3), np.uint8))
    register_datasets(config(coco=[write_coco(tmp_path, boxes=[[5, 5, 1, 1]])]))
    (record,) = DatasetCatalog.get("mine")
    assert len(trained_on(record)) == 1


def test_voc_boxes_keep_the_fractions_of_a_resized_image(tmp_path):
    register_datasets(config(voc=[write_voc(tmp_path, [("cat", 6, 6, 14, 14, "")])]))
    (box,) = trained_on(DatasetCatalog.get("mine")[0]).gt_boxes.tensor.numpy()
    scale = np.array([25 / 40, 19 / 30] * 2)
    np.testing.assert_allclose(box, np.array([5, 5, 14, 14]) * scale, rtol=1e-6)


def test_only_the_named_datasets_need_their_files(tmp_path):
    entry = write_coco(tmp_path / "coco", boxes=[])
    voc = ["other", *write_voc(tmp_path / "voc", [])[1:]]
    gone = [["gone", "gone.json", "gone"], ["lost", "lost", "some", ["cat"]]]
    cfg = config(coco=[entry, gone[0]], voc=[voc, gone[1]])
    register_datasets(cfg, names=("mine", "other"))
    assert {"mine", "other"} <= set(DatasetCatalog) and "gone" not in DatasetCatalog
    with pytest.raises(FileNotFoundError, match="gone.json"):
        register_datasets(cfg)


def test_clean_data_gives_no_warning(tmp_path, caplog):
    register_datasets(config(coco=[write_coco(tmp_path, boxes=[[0, 0, 5, 5]])]))
    with caplog.at_level(logging.WARNING, logger="globalkd"):
        DatasetCatalog.get("mine")
    assert not [r for r in caplog.records if r.name.startswith("globalkd")]


def test_two_categories_of_one_name_are_warned_of(tmp_path, caplog):
    categories = [(7, "cat"), (3, "dog"), (9, "cat")]
    register_datasets(config(coco=[write_coco(tmp_path, boxes=[], categories=categories)]))
    assert MetadataCatalog.get("mine").thing_classes == ["dog", "cat", "cat"]
    assert "1 names stand for several categories, such as 'cat' for those of ids 7, 9" in (
        caplog.text
    )


def test_a_file_of_two_image_ids_is_warned_of(tmp_path, caplog):
    entry = write_coco(tmp_path, boxes=[[0, 0, 5, 5]])
    content = json.loads(Path(entry[1]).read_text())
    content["images"].append({**content["images"][0], "id": 6})
    Path(entry[1]).write_text(json.dumps(content))
    register_datasets(config(coco=[entry]))
    assert len(DatasetCatalog.get("mine")) == 2
    assert "mine: 1 image files have several ids, such as a.png with 5, 6" in caplog.text


def test_ambiguity_and_crowds_reach_the_dataset_dicts(tmp_path):
    entry = write_coco(tmp_path, boxes=[[0, 0, 5, 5]], ambiguity=0.5, iscrowd=1, other="x")
    register_datasets(config(coco=[entry]))
    (annotation,) = DatasetCatalog.get("mine")[0]["annotations"]
    assert annotation["ambiguity"] == 0.5 and annotation["iscrowd"] == 1
    assert "other" not in annotation


def test_digit_scenes_load_with_their_ambiguity(tmp_path):
    root = make_digit_scenes(tmp_path / "x", num_train=3, num_val=0, image_size=64)
    register_datasets(config(coco=[["mine", f"{root}/train.json", f"{root}/train"]]))
    records = DatasetCatalog.get("mine")
    assert MetadataCatalog.get("mine").thing_classes == [str(n) for n in range(10)]
    assert all(Path(record["file_name"]).is_file() for record in records)
    assert all("ambiguity" in a for record in records for a in record["annotations"])


@pytest.mark.parametrize("extension", [".jpg", ".jpeg", ".png", ".JPG"])
def test_voc_folders_load_with_zero_based_boxes_and_the_difficult_flag(tmp_path, extension):
    objects = [
        ("dog", 1, 1, 40, 30, "<difficult>1</difficult>"),
        ("cat", 3.5, 4, 7.25, 9, ""),
    ]
    entry = write_voc(tmp_path, objects, name="an image", extension=extension)
    register_datasets(config(voc=[entry]))
    (record,) = DatasetCatalog.get("mine")
    assert record["file_name"] == str(tmp_path / f"JPEGImages/an image{extension}")
    assert (record["image_id"], record["width"], record["height"]) == ("an image", 40, 30)
    first, second = record["annotations"]
    assert first["bbox"] == [0, 0, 40, 30] and first["difficult"] and first["category_id"] == 1
    assert second["bbox"] == [2.5, 3, 7.25, 9] and not second["difficult"]
    assert MetadataCatalog.get("mine").thing_classes == ["cat", "dog"]


def test_voc_boxes_of_no_area_are_dropped_with_one_warning(tmp_path, caplog):
    objects = [("cat", 5, 5, 5, 5, ""), ("cat", 9, 5, 7, 8, ""), ("cat", 5, 5, 6, 6, "")]
    register_datasets(config(voc=[write_voc(tmp_path, objects)]))
    with caplog.at_level(logging.WARNING, logger="globalkd"):
        (record,) = DatasetCatalog.get("mine")
    assert [a["bbox"] for a in record["annotations"]] == [[4, 4, 6, 6]]
    assert "dropped 2 boxes" in caplog.text and "one.png" in caplog.text


def test_images_of_a_voc_split_may_lie_in_subfolders(tmp_path):
    write_voc(tmp_path, [("cat", 5, 5, 9, 9, "")], name="a")
    for part, file in (("Annotations", "a.xml"), ("JPEGImages", "a.png")):
        (tmp_path / part / "s/t").mkdir(parents=True)
        for sub in ("s", "s/t"):
            (tmp_path / part / sub / file).write_bytes((tmp_path / part / file).read_bytes())
    (tmp_path / "ImageSets/Main/some.txt").write_text("s/a\na\ns/t/a\n")
    register_datasets(config(voc=[["mine", str(tmp_path), "some", ["cat"]]]))
    records = DatasetCatalog.get("mine")
    assert [r["image_id"] for r in records] == ["s/a", "a", "s/t/a"]
    for record in records:
        assert record["file_name"] == str(tmp_path / f"JPEGImages/{record['image_id']}.png")
        assert len(record["annotations"]) == 1
    (tmp_path / "ImageSets/Main/some.txt").write_text("s/a\nu/a\n")
    with pytest.raises(FileNotFoundError, match="There is no .*u/a.jpg .*split 'some' lists"):
        DatasetCatalog.get("mine")


@pytest.mark.parametrize(("text", "difficult"), [("true", True), (" False ", False), ("", False)])
def test_a_voc_flag_may_be_a_word(tmp_path, text, difficult):
    objects = [("cat", 5, 5, 9, 9, f"<difficult>{text}</difficult>")]
    register_datasets(config(voc=[write_voc(tmp_path, objects)]))
    (annotation,) = DatasetCatalog.get("mine")[0]["annotations"]
    assert annotation["difficult"] == difficult


def test_the_parts_of_a_voc_object_are_no_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>5</xmin></bndbox></part>"
    register_datasets(config(voc=[write_voc(tmp_path, [("cat", 5, 5, 9, 9, part)])]))
    assert len(DatasetCatalog.get("mine")[0]["annotations"]) == 1


def within(tag):
    """Puts all objects of an annotation file into an element."""
    return lambda text: text.replace("</size>", f"</size><{tag}>").replace(
        "</annotation>", f"</{tag}></annotation>"
    )


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (within("objects"), "1 <bndbox>, but 0 <object> of <annotation>"),
        (lambda text: text.replace("object>", "Object>"), "1 <bndbox>, but 0 <object>"),
        (
            lambda text: text.replace("</name>", "</name><difficult>maybe</difficult>"),
            "<difficult> is 'maybe'; it must be one of 0, 1, false, true",
        ),
        (lambda text: text.replace("cat", "cow"), "unknown class 'cow'.*'cat', 'dog'"),
        (lambda text: text.replace("<width>40", "<width>0"), "<size> is 0 x 30"),
        (lambda text: text.replace("<xmin>5</xmin>", ""), "no <bndbox/xmin>"),
        (lambda text: text.replace("<xmin>5", "<xmin>five"), "five"),
        (lambda text: text[:60], "not a VOC annotation"),
    ],
)
def test_a_wrong_voc_annotation_is_named(tmp_path, change, said):
    register_datasets(config(voc=[write_voc(tmp_path, [("cat", 5, 5, 9, 9, "")])]))
    path = tmp_path / "Annotations/one.xml"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=f"(?s)one.xml.*{said}"):
        DatasetCatalog.get("mine")


@pytest.mark.faults
@pytest.mark.parametrize("lost", ["Annotations/one.xml", "JPEGImages/one.png"])
def test_a_missing_voc_file_is_named(tmp_path, lost):
    register_datasets(config(voc=[write_voc(tmp_path, [])]))
    (tmp_path / lost).unlink()
    with pytest.raises(FileNotFoundError, match="one"):
        DatasetCatalog.get("mine")


@pytest.mark.real_data
@pytest.mark.skipif(not (REAL / "bccd").is_dir(), reason="no bccd in GLOBALKD_TEST_DATA")
def test_bccd_loads_as_with_detectron2_but_for_its_two_boxes_of_no_area(caplog):
    folder, total = str(REAL / "bccd"), 0
    for split, size in (("train", 205), ("val", 87), ("test", 72)):
        register_datasets(config(voc=[[f"bccd_{split}", folder, split, BCCD]]))
        with caplog.at_level(logging.WARNING, logger="globalkd"):
            records = DatasetCatalog.get(f"bccd_{split}")
        assert len(records) == size
        theirs = load_voc_instances(folder, split, BCCD)
        ours = load_voc_folder(folder, split, BCCD)
        for mine, other in zip(ours, theirs, strict=True):
            whole = [a for a in other["annotations"] if a["bbox"][2] - a["bbox"][0] > 1]
            found = [a for a in mine["annotations"] if a["bbox"][2] > a["bbox"][0]]
            assert [a["bbox"] for a in found] == [a["bbox"] for a in whole]
            assert mine["file_name"] == other["file_name"]
        total += sum(len(record["annotations"]) for record in records)
    warnings = [record.getMessage() for record in caplog.records]
    assert total == 4888 - 2
    assert "00338" in "".join(warnings) and "00343" in "".join(warnings) and len(warnings) <= 2


@pytest.mark.real_data
@pytest.mark.skipif(not (REAL / "coco_cc").is_dir(), reason="no coco_cc in GLOBALKD_TEST_DATA")
def test_real_coco_images_load_with_their_crowds():
    root = REAL / "coco_cc"
    entry = ["cc", str(root / "annotations/instances_val2017.json"), str(root / "val2017")]
    register_datasets(config(coco=[entry]))
    metadata = MetadataCatalog.get("cc")
    assert metadata.thing_classes == MetadataCatalog.get("coco_2017_val").thing_classes
    records = DatasetCatalog.get("cc")
    annotations = [a for record in records for a in record["annotations"]]
    assert len(records) == 49 and len(annotations) == 495
    assert any(a["iscrowd"] for a in annotations)
