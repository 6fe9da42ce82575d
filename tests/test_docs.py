"""The documentation's examples run, and its links lead somewhere."""

import copy
import re

import pytest
from conftest import ROOT
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from globalkd.config_reading import load_config
from globalkd.data import register_datasets

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
PAGES += [ROOT / "projects/GlobalKD/README.md"]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_links_and_pictures_exist(page):
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    lines = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).splitlines()
    headings = [line.lstrip("#").strip() for line in lines if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@each_page
def test_links_into_pages_find_their_heading(page):
    links = re.findall(r"\]\(([^):]*)#([^)]+)\)", page.read_text())
    targets = [(page.parent / name if name else page, heading) for name, heading in links]
    missing = [(t.name, heading) for t, heading in targets if heading not in anchors(t)]
    assert not missing


@pytest.mark.parametrize("page, base", [("globalkd.md", ""), ("drkd.md", "losses")])
def test_the_code_that_a_papers_sentence_leads_to_exists(page, base):
    text = (ROOT / "docs" / page).read_text()
    named = re.findall(r"`([\w/.]+\.py)(?:: ([\w.]+))?`", text)
    assert named
    missing = []
    for path, name in named:
        folders = (ROOT, ROOT / "projects/GlobalKD/globalkd" / base)
        file = next((x / path for x in folders if (x / path).is_file()), None)
        last = name.rpartition(".")[2]
        if file is None or not re.search(rf"(def|class) {last}", file.read_text()):
            missing.append((path, name))
    assert not missing


@each_page
def test_files_named_in_commands_exist(page):
    text = page.read_text()
    named = re.findall(r"\b((?:configs|tools|docs)/[\w./-]+\.(?:yaml|py|md))", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_the_configurations_on_a_page_can_be_read(page, tmp_path):
    blocks = re.findall(
        r"```yaml\n# (my_\w+\.yaml).*?\n(.*?)```", (ROOT / page).read_text(), re.DOTALL
    )
    for name, text in blocks:
        (tmp_path / name).write_text(text.replace('"configs/', f'"{ROOT}/configs/'))
    cfgs = {name: load_config(str(tmp_path / name)) for name, _ in blocks}
    assert cfgs["my_student.yaml"].MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert {cfg.OUTPUT_DIR for cfg in cfgs.values()} == {name[:-5] for name in cfgs}
    for name, cfg in cfgs.items():
        assert (name == "my_distilled.yaml") == cfg.MODEL.META_ARCHITECTURE.startswith("Distill")


def test_the_worked_example_of_a_loss_trains(tiny_cfg, batch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own_loss.md").read_text(), re.DOTALL)
    exec(compile(code, "own_loss.md", "exec"), {})
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.LOSSES", ["GlobalKnowledge", "NormMatching"])
    register_datasets(cfg)
    model = build_model(cfg).train()
    with EventStorage():
        losses = model(copy.deepcopy(batch))
    assert losses["loss_kd_norm"] > 0
    losses["loss_kd_norm"].backward()
    assert any(p.grad is not None for p in model.backbone.parameters())
    assert losses["loss_kd_norm"].isfinite()
