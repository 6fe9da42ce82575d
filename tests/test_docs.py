"""The documentation's examples run, and its links lead somewhere."""

import copy
import re

import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from globalkd.data import register_datasets

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
PAGES += [ROOT / "projects/GlobalKD/README.md"]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_links_and_pictures_exist(page):
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@each_page
def test_files_named_in_commands_exist(page):
    text = page.read_text()
    named = re.findall(r"\b((?:configs|tools|docs)/[\w./-]+\.(?:yaml|py|md))", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


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
    torch.testing.assert_close(losses["loss_kd_norm"].isfinite(), torch.tensor(True))
