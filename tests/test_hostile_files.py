"""Files that try to run code or to reach others: none does, and the message says why it is refused.

Every payload writes a marker file; each test ends by looking that it is not there.
"""

import json
import os
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from safetensors import SafetensorError

from globalkd import add_globalkd_config, register_datasets
from globalkd.analysis.html import Page
from globalkd.analysis.runs import load_run
from globalkd.config_reading import load_config
from globalkd.engine.checkpoint import AtomicCheckpointer
from globalkd.engine.trainer import DistillTrainer
from globalkd.prototypes import files as prototype_file
from globalkd.safe_loading import SafeCheckpointer
from globalkd.teacher.building import load_teacher_weights, teacher_config

ROOT = Path(__file__).resolve().parent.parent
REFUSED = "holds more than tensors.*ALLOW_PICKLE"


@pytest.fixture
def marker(tmp_path):
    """The file that a payload writes if it runs."""
    path = tmp_path / "the payload ran"
    yield path
    assert not path.exists()


pytestmark = pytest.mark.usefixtures("catalogs")


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_hostile(path, marker, *, protocol=2):
    """A checkpoint of Linear(2, 2) with a payload, in the format of the file's ending."""
    state = torch.nn.Linear(2, 2).state_dict()
    content = {"model": state, "model_state": state, "__author__": "x", "more": Payload(marker)}
    if path.suffix == ".pkl":
        content["model"] = {name: x.numpy() for name, x in state.items()}
        content.pop("model_state")
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        torch.save(content, path)
    return str(path)


def test_the_payload_would_run(tmp_path):
    with open(write_hostile(tmp_path / "x.pkl", tmp_path / "ran"), "rb") as f:
        pickle.load(f)
    assert (tmp_path / "ran").exists()


@pytest.mark.faults
@pytest.mark.parametrize("ending", ["pkl", "pth", "pyth"])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, marker, ending):
    path = write_hostile(tmp_path / f"x.{ending}", marker)
    with pytest.raises(ValueError, match=f"x.{ending} {REFUSED}") as error:
        SafeCheckpointer(torch.nn.Linear(2, 2)).load(path)
    assert "posix.mkdir" in str(error.value)


@pytest.mark.parametrize("ending", ["pkl", "pth"])
def test_an_explicit_key_allows_it(tmp_path, ending):
    path = write_hostile(tmp_path / f"x.{ending}", tmp_path / "ran")
    SafeCheckpointer(torch.nn.Linear(2, 2), allow_pickle=True).load(path)
    assert (tmp_path / "ran").exists()


@pytest.mark.faults
@pytest.mark.parametrize(
    "name",
    [
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"cbuiltins\ngetattr\n",
        b"cnumpy\nload\n",
        b"cnumpy.core.multiarray\nfromfile\n",
        b"cnumpy\nndarray.__class__\n",
        b"c_codecs\nencode\nX\x01\x00\x00\x00xX\x03\x00\x00\x00zip\x86R",
    ],
)
def test_only_the_names_of_arrays_are_known_to_the_reader_of_pkl(tmp_path, name):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02" + name + b".")
    with pytest.raises(ValueError, match="it asks for"):
        SafeCheckpointer(torch.nn.Linear(2, 2)).load(str(path))


@pytest.mark.parametrize(
    ("protocol", "numpy_1"), [*((p, False) for p in range(6)), *((p, True) for p in range(4))]
)
def test_model_zoo_files_are_read(tmp_path, protocol, numpy_1):
    weight = np.arange(4, dtype=np.float32).reshape(2, 2)
    content = {
        "model": OrderedDict(weight=weight, bias=np.asfortranarray(weight)[0]),
        "__author__": "Detectron2 Model Zoo",
        "matching_heuristics": True,
        "step": np.float32(3),
        "raw": b"\xff\x00",
        "names": np.array(["a", "ß"]),
    }
    written = pickle.dumps(content, protocol=protocol)
    if numpy_1:  # the module's name before NumPy 2; from protocol 4 on its length stands before it
        written = written.replace(b"numpy._core.", b"numpy.core.")
    (tmp_path / "zoo.pkl").write_bytes(written)
    model = torch.nn.Linear(2, 2)
    extra = SafeCheckpointer(model).load(str(tmp_path / "zoo.pkl"))
    assert torch.equal(model.weight.detach(), torch.from_numpy(weight))
    assert extra["step"] == 3 and extra["raw"] == b"\xff\x00" and extra["names"][1] == "ß"


def test_a_file_of_python_2_is_read(tmp_path):
    """Detectron's and Caffe2's: protocol 2, byte strings for text."""
    weight = np.arange(4, dtype="<f4").reshape(2, 2)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02K\x02\x86cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x10"
    )
    blobs = b"}U\x06weight" + array + weight.tobytes() + b"tbs"
    (tmp_path / "old.pkl").write_bytes(b"\x80\x02}U\x05blobs" + blobs + b"s.")
    checkpointer = SafeCheckpointer(torch.nn.Linear(2, 2))
    loaded = checkpointer._load_file(str(tmp_path / "old.pkl"))
    assert loaded["matching_heuristics"] and loaded["__author__"] == "Caffe2"
    np.testing.assert_array_equal(loaded["model"]["weight"], weight)


@pytest.mark.faults
def test_weights_under_another_name_are_named(tmp_path):
    path = str(tmp_path / "ema.pth")
    torch.save({"ema_state": torch.nn.Linear(2, 2).state_dict(), "iteration": 3}, path)
    with pytest.raises(ValueError, match=r"ema.pth has no entry \"model\".*it has \['ema_state'\]"):
        SafeCheckpointer(torch.nn.Linear(2, 2)).load(path)


@pytest.mark.faults
@pytest.mark.parametrize("content", [b"", b"hello, no checkpoint", b"\x80\x02}U\x05blo", b"PK"])
@pytest.mark.parametrize("ending", ["pkl", "pth"])
def test_a_file_of_something_else_is_named(tmp_path, content, ending):
    (tmp_path / f"x.{ending}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.{ending} (is not a complete|holds more than)"):
        SafeCheckpointer(torch.nn.Linear(2, 2)).load(str(tmp_path / f"x.{ending}"))


@pytest.mark.faults
@pytest.mark.parametrize("ending", ["pkl", "pth"])
def test_weights_of_a_teacher_are_refused(tmp_path, marker, ending):
    path = write_hostile(tmp_path / f"x.{ending}", marker)
    with pytest.raises(ValueError, match=REFUSED):
        load_teacher_weights(torch.nn.Linear(2, 2), path)


@pytest.mark.faults
def test_model_weights_and_a_checkpoint_to_resume_are_refused(tmp_path, marker, tiny_cfg):
    path = write_hostile(tmp_path / "x.pth", marker)
    cfg = tiny_cfg("rcnn", "MODEL.WEIGHTS", path, distill=False)
    os.makedirs(cfg.OUTPUT_DIR)
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    with pytest.raises(ValueError, match=REFUSED):
        trainer.resume_or_load(resume=False)
    checkpointer = AtomicCheckpointer(torch.nn.Linear(2, 2), cfg.OUTPUT_DIR)
    os.rename(path, Path(cfg.OUTPUT_DIR, "x.pth"))
    checkpointer.tag_last_checkpoint("x.pth")
    with pytest.raises(ValueError, match=REFUSED):
        checkpointer.resume_or_load("", resume=True)


@pytest.mark.faults
def test_the_checkpoint_of_a_run_is_refused_by_the_tools(tmp_path, marker, tiny_cfg):
    cfg = tiny_cfg("rcnn", distill=False)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    write_hostile(tmp_path / "model_final.pth", marker)
    with pytest.raises(ValueError, match=REFUSED):
        load_run(tmp_path)


def test_nothing_else_reads_pickles_or_configs():
    """All reading goes through `safe_loading` and `config_reading`."""
    unsafe = re.compile(
        r"\bDetectionCheckpointer\b|pickle\.loads?\b|\bnp\.load\b|merge_from_file"
        r"|yaml\.(load|unsafe_load|full_load)\b|torch\.load\((?!.*weights_only=True)"
    )
    own = ("safe_loading.py", "config_reading.py")
    folders = ("projects/**", "tools", "demo", ".")
    sources = [path for folder in folders for path in ROOT.glob(f"{folder}/*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if path.name not in own and unsafe.search(line) and "`" not in line
    ]
    allowed = 'mock.patch.object(defaults, "DetectionCheckpointer"'
    assert [line for line in found if allowed not in line] == []


# Configuration files


TAGS = [
    "!!python/object/apply:os.mkdir [{marker}]",
    "!!python/object/new:os.mkdir [{marker}]",
    "!!python/name:os.system",
    "!!python/object/apply:eval [\"__import__('os').mkdir('{marker}')\"]",
]


@pytest.mark.faults
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_python_tag_is_refused_also_in_a_base(tmp_path, marker, tag, depth):
    hostile = f"SEED: {tag.format(marker=marker)}\n"
    (tmp_path / "0.yaml").write_text(hostile)
    for i in range(depth):
        (tmp_path / f"{i + 1}.yaml").write_text(f'_BASE_: "{i}.yaml"\n')
    with pytest.raises(ValueError, match="0.yaml has a YAML tag.*could run code.*python/"):
        load_config(str(tmp_path / f"{depth}.yaml"))
    with pytest.raises(ValueError, match="YAML tag"):
        teacher_config(str(tmp_path / f"{depth}.yaml"))


@pytest.mark.faults
def test_a_link_into_the_model_zoo_does_not_make_a_file_trusted(tmp_path, marker):
    (tmp_path / "model_zoo" / "configs").mkdir(parents=True)
    path = tmp_path / "model_zoo" / "configs" / "x.yaml"
    path.write_text(f"SEED: !!python/object/apply:os.mkdir [{marker}]\n")
    with pytest.raises(ValueError, match="YAML tag"):
        load_config(str(path))


def test_the_model_zoos_own_tag_still_works():
    cfg = teacher_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0] == [32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)]


@pytest.mark.faults
def test_overrides_are_data(tmp_path, marker):
    (tmp_path / "x.yaml").write_text("SEED: 1\n")
    code = f"__import__('os').mkdir('{marker}')"
    with pytest.raises(ValueError, match="SEED is"):
        load_config(str(tmp_path / "x.yaml"), ["SEED", code])
    cfg = load_config(str(tmp_path / "x.yaml"), ["OUTPUT_DIR", code])
    assert code == cfg.OUTPUT_DIR


@pytest.mark.slow
@pytest.mark.faults
def test_train_net_refuses_a_hostile_config(tmp_path, marker):
    (tmp_path / "x.yaml").write_text(f"SEED: !!python/object/apply:os.mkdir [{marker}]\n")
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", "x.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode != 0 and "YAML tag whose reading could run code" in ended.stderr


# Prototype files


@pytest.mark.faults
def test_a_pickle_with_the_name_of_a_prototype_file_is_refused(tmp_path, marker):
    path = tmp_path / "p.safetensors"
    path.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        prototype_file.read(str(path))


@pytest.mark.faults
def test_a_header_that_points_outside_its_file_is_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 10**9]}}).encode()
    path = tmp_path / "p.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="not a complete safetensors file") as error:
        prototype_file.read(str(path))
    assert isinstance(error.value.__cause__, SafetensorError)


# HTML pages


class TagReader(HTMLParser):
    """The elements, attributes and text that a browser would see."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.texts = set(), {}, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes.update(attrs)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.faults
@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "' onload='alert(1)",
        "</pre></title></style><svg onload=alert(1)>",
        "<!-- <iframe src=javascript:alert(1)>",
        "&lt;script&gt;",
    ],
)
def test_nothing_in_a_page_is_unescaped(tmp_path, text):
    def written(text):
        page = Page(text)
        page.heading(text)
        page.paragraph(text)
        page.table([text], [[text], [Path(text)]])
        page.image(np.zeros((2, 2, 3), np.uint8), text)
        page.gallery([(np.zeros((2, 2, 3), np.uint8), text)])
        page.details(text, text)
        return TagReader(page.write(tmp_path / "page.html").read_text())

    found, harmless = written(text), written("text")
    assert found.tags == harmless.tags and found.attributes.keys() == harmless.attributes.keys()
    assert found.attributes["alt"] == text
    assert len([x for x in found.texts if x == text]) >= 8


# Datasets


def coco(folder, file_name):
    """A dataset in folder/images of one image with the given name; its entry."""
    (folder / "images").mkdir(exist_ok=True)
    content = {
        "images": [{"id": 1, "file_name": file_name, "height": 8, "width": 8}],
        "annotations": [],
        "categories": [{"id": 1, "name": "a"}],
    }
    (folder / "x.json").write_text(json.dumps(content))
    return ["hostile", str(folder / "x.json"), str(folder / "images")]


def load(entry, kind="COCO"):
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.DATASETS[kind] = [entry]
    register_datasets(cfg)
    return DatasetCatalog.get(entry[0])


@pytest.mark.faults
@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret.png", "a/../../secret.png", "..\\secret.png", "..", "a\0b"]
)
def test_a_path_of_a_json_that_leaves_the_image_folder_is_refused(tmp_path, name):
    cv2.imwrite(str(tmp_path / "secret.png"), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="'hostile'.*x.json.*lead out of the image folder"):
        load(coco(tmp_path, name))


@pytest.mark.parametrize("name", ["a.png", "sub/a.png", "./a.png", "a..b.png", "...png"])
def test_paths_in_the_image_folder_are_kept(tmp_path, name):
    (record,) = load(coco(tmp_path, name))
    assert record["file_name"] == os.path.join(tmp_path, "images", name)


def test_links_in_the_image_folder_are_followed(tmp_path):
    """They are the work of the folder's owner, not of the JSON's, and usual on clusters."""
    entry = coco(tmp_path, "a.png")
    (tmp_path / "images" / "a.png").symlink_to(tmp_path / "elsewhere.png")
    assert load(entry)[0]["file_name"] == str(tmp_path / "images" / "a.png")


@pytest.mark.faults
@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_a_voc_split_cannot_name_a_file_elsewhere(tmp_path, name):
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/some.txt").write_text(name)
    with pytest.raises(FileNotFoundError, match="split 'some' lists"):
        load(["hostile", str(tmp_path), "some", ["a"]], "VOC")


@pytest.mark.faults
@pytest.mark.parametrize(
    "entity",
    [
        '<!ENTITY x SYSTEM "file:///etc/hostname">',
        '<!ENTITY a "ha"><!ENTITY b "' + "&a;" * 999 + '"><!ENTITY c "' + "&b;" * 999 + '">'
        '<!ENTITY d "' + "&c;" * 999 + '"><!ENTITY x "' + "&d;" * 999 + '">',
    ],
    ids=["file", "billion laughs"],
)
def test_entities_that_read_files_or_grow_without_bound_are_refused(tmp_path, entity):
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/some.txt").write_text("one")
    cv2.imwrite(str(tmp_path / "JPEGImages/one.png"), np.zeros((8, 8, 3), np.uint8))
    text = f"<!DOCTYPE annotation [{entity}]><annotation><folder>&x;</folder></annotation>"
    (tmp_path / "Annotations/one.xml").write_text(text)
    with pytest.raises(ValueError, match="one.xml: not a VOC annotation"):
        load(["hostile", str(tmp_path), "some", ["a"]], "VOC")
