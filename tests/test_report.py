"""The HTML report: self-contained, complete, and without an error in a browser; comparing runs."""

import base64
import csv
import io
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from conftest import ROOT
from detectron2.config import get_cfg
from PIL import Image

from globalkd import add_globalkd_config
from globalkd.analysis import compare
from globalkd.analysis.compare import compare_report
from globalkd.analysis.html import Page, data_uri
from globalkd.analysis.report import add_part, build_report, config_differences
from globalkd.analysis.runs import load_run, read_config, written_config
from globalkd.experiments.tables import COLUMNS

sys.path.insert(0, str(ROOT / "tools"))
import analyze

import demo


class Elements(HTMLParser):
    """All start tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def check_self_contained(text):
    """Every image is in the page and decodes; nothing is loaded, and nothing runs."""
    page = Elements(text)
    for attributes in page.of("img"):
        header, content = attributes["src"].split(",", 1)
        assert header in ("data:image/png;base64", "data:image/jpeg;base64")
        Image.open(io.BytesIO(base64.b64decode(content, validate=True))).load()
    loading = {"script", "link", "iframe", "object", "embed", "video", "audio", "base", "form"}
    assert not loading & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert not {"href", "srcset", "action"} & set(attributes), (tag, attributes)
    assert "url(" not in text and "@import" not in text
    (policy,) = [m["content"] for m in page.of("meta") if "http-equiv" in m]
    assert "default-src 'none'" in policy and "script" not in policy
    return page


def a_page():
    image = np.zeros((4, 6, 3), np.uint8)
    page = Page("Title <script>alert(1)</script>")
    page.heading("Heading & more")
    page.paragraph("a < b")
    page.table(["name", "value"], [["<b>", 1.5], ["text", "2.0 ± 0.1"]])
    page.image(image, 'caption "quoted"')
    page.gallery([(image, "one"), (image, "two")])
    page.details("More", "key: <value>")
    return page


def test_what_goes_in_comes_out_as_text(tmp_path):
    page = check_self_contained(a_page().write(tmp_path / "new" / "page.html").read_text())
    for text in ("<script>alert(1)</script>", "Heading & more", "a < b", "<b>", "key: <value>"):
        assert text in page.text
    assert [image["alt"] for image in page.of("img")] == ['caption "quoted"', "one", "two"]
    # A column whose cells all start as numbers do is aligned as one.
    assert [cell.get("class") for cell in page.of("td")] == [None, "number", None, "number"]
    assert [cell.get("class") for cell in page.of("th")] == [None, "number"]


def test_an_image_keeps_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    header, content = data_uri(tmp_path / "image.png").split(",")
    assert header == "data:image/png;base64"
    assert base64.b64decode(content) == (tmp_path / "image.png").read_bytes()
    flat = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    header, content = data_uri(flat).split(",")
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    assert header == "data:image/jpeg;base64"
    assert np.abs(decoded.astype(int) - flat).max() < 5


@pytest.mark.faults
@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match="must be"):
        data_uri(image)


@pytest.mark.faults
def test_a_file_of_another_kind_is_named():
    with pytest.raises(ValueError, match="figure.svg cannot be embedded"):
        data_uri("figure.svg")


def test_only_what_differs_from_the_defaults_is_listed():
    defaults = get_cfg()
    add_globalkd_config(defaults)
    cfg = defaults.clone()
    assert config_differences(cfg, defaults) == []
    cfg.MODEL.GLOBALKD.PROTOTYPES.NUM = 5
    cfg.SEED = 3
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS = list(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    assert config_differences(cfg, defaults) == [
        ("MODEL.GLOBALKD.PROTOTYPES.NUM", "5", "10"),
        ("SEED", "3", "-1"),
    ]


def test_a_section_shows_texts_tables_and_pictures_of_its_folder(tmp_path):
    page = Page("Title")
    add_part(page, "noise", tmp_path / "nothing")
    assert "Noise" not in page.write(tmp_path / "page.html").read_text()
    (tmp_path / "summary.txt").write_text("so many errors")
    with (tmp_path / "long.csv").open("w") as stream:
        csv.writer(stream).writerows([["a", "b"], *([i, i] for i in range(100))])
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(tmp_path / "figure.png")
    add_part(page, "noise", tmp_path)
    shown = check_self_contained(page.write(tmp_path / "page.html").read_text())
    assert "so many errors" in shown.text and "has 100 rows: a, b" in shown.text
    assert len(shown.of("img")) == 1


def test_numbers_from_ten_on_are_rounded(tmp_path):
    with (tmp_path / "table.csv").open("w") as stream:
        csv.writer(stream).writerows([["AP"], ["31.8456"], ["-99.9951"], ["0.8456"], ["12"]])
    page = Page("Title")
    add_part(page, "noise", tmp_path)
    text = page.write(tmp_path / "page.html").read_text()
    assert all(f">{cell}<" in text for cell in ("31.85", "-100.00", "0.8456", "12"))


def finish(folder, ap):
    """Give an untrained run the records of a finished one."""
    records = [
        {"iteration": 19, "loss_cls": 2.0, "loss_kd_global": 0.5, "total_loss": 2.5},
        {"iteration": 39, "loss_cls": 1.0, "loss_kd_global": 0.2, "kd/reliability": 0.7},
        {"iteration": 40, "bbox/AP": ap, "bbox/AP50": 2 * ap},
    ]
    Path(folder, "metrics.json").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def runs(untrained_run, plain_run, monkeypatch):
    """Output folders of a distilled and a plain run."""
    monkeypatch.setattr(compare, "TRACED_IMAGES", 1)  # tracing takes most of the time
    finish(untrained_run, 12.5)
    finish(plain_run, 11.25)
    return str(untrained_run), str(plain_run)


def test_comparing_runs_gives_results_and_costs_with_the_teacher(runs, tmp_path):
    analyze.main(["compare", *runs, "--output", str(tmp_path / "c"), "--num-images", "1"])
    rows = list(csv.DictReader((tmp_path / "c" / "compare.csv").open()))
    assert [row["run"] for row in rows] == ["teacher of untrained", "untrained", "plain"]
    teacher, distilled, plain = rows
    assert (distilled["AP"], plain["AP"], teacher["AP"]) == ("12.5000", "11.2500", "")
    for cost in ("parameters_M", "GFLOPs"):
        assert float(teacher[cost]) > float(distilled[cost]) == float(plain[cost]) > 0
    parameters = sum(p.numel() for p in load_run(runs[1]).parameters())
    assert float(plain["parameters_M"]) == pytest.approx(parameters / 1e6, abs=1e-4)
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert (tmp_path / "c" / "compare.png").stat().st_size > 0


def test_of_several_test_sets_the_first_is_compared(runs, tmp_path, caplog):
    path = Path(runs[0], "config.yaml")
    cfg = written_config(runs[0])
    first, second = cfg.DATASETS.TEST[0], cfg.DATASETS.TRAIN[0]
    cfg.DATASETS.TEST = (first, second)
    path.write_text(cfg.dump())
    metrics = Path(runs[0], "metrics.json")
    text = metrics.read_text().replace("bbox/", f"{first}/bbox/")
    metrics.write_text(text.replace('"iteration": 40', f'"iteration": 40, "{second}/bbox/AP": 99'))
    rows = compare_report(runs, output=tmp_path, num_images=1)
    assert [row["AP"] for row in rows[1:]] == [12.5, 11.25]
    assert "different test sets" not in caplog.text
    cfg.DATASETS.TEST = (second, first)
    path.write_text(cfg.dump())
    rows = compare_report(runs, output=tmp_path, num_images=1)
    assert rows[1]["AP"] == 99 and "AP are of different test sets" in caplog.text
    cfg.DATASETS.TEST = ()
    path.write_text(cfg.dump())
    with pytest.raises(ValueError, match="DATASETS.TEST names no dataset"):
        compare_report(runs, output=tmp_path, num_images=1)


def test_runs_whose_data_lie_elsewhere_are_compared(runs, scenes, tmp_path):
    for folder in runs:
        path = Path(folder, "config.yaml")
        path.write_text(path.read_text().replace(str(scenes), str(scenes / "moved")))
    datasets = repr([["compare_here", str(scenes / "val.json"), str(scenes / "val")]])
    opts = ["--opts", "DATASETS.COCO", datasets, "DATASETS.TEST", "['compare_here']"]
    path = tmp_path / "report.html"
    analyze.main(["report", runs[1], "--output", str(path), *opts])  # compares, by default
    rows = list(csv.DictReader(Path(runs[1], "compare/compare.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["plain"] and float(rows[0]["GFLOPs"]) > 0
    assert "compare_here" in check_self_contained(path.read_text()).text


def test_a_teacher_among_the_runs_is_listed_once(runs, tmp_path):
    distilled, plain = runs
    path = Path(distilled, "config.yaml")
    cfg = read_config(distilled)
    cfg.MODEL.GLOBALKD.TEACHER.WEIGHTS = str(Path(plain, "model_final.pth"))
    path.write_text(cfg.dump())
    found = compare.contestants([Path(plain), Path(distilled)], "model_final.pth")
    assert [contestant.name for contestant in found] == ["plain", "untrained"]


def test_the_report_has_everything_in_one_file(runs, tmp_path):
    distilled, plain = runs
    path = tmp_path / "report.html"
    analyze.main(
        ["report", distilled, "--plain", plain, "--parts", "compare", "--output", str(path)]
    )
    page = check_self_contained(path.read_text())
    for text in ("Results", "Configuration", "MODEL.GLOBALKD.PROTOTYPES.NUM", "12.50", "11.25"):
        assert text in page.text, text
    assert "12.5000" not in page.text
    assert len(page.of("img")) == 2 and len(page.of("details")) == 1
    assert read_config(distilled).dump() in page.text


@pytest.mark.slow
def test_the_demo_writes_a_report_with_its_figures(runs, tmp_path):
    distilled, plain = runs
    for name in demo.FIGURES:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    numbers = {column: [1.0, 3.0] for column in COLUMNS}
    results = dict.fromkeys(("teacher", "plain", "distilled"), numbers)
    demo.write_report(tmp_path, plain, distilled, results)
    page = check_self_contained((tmp_path / "report.html").read_text())
    for title in ("Results", "Distillation", "Configuration", "Noise", "Discrepancy", "The demo"):
        assert title in page.text
    assert "2.00 ± 1.41" in page.text
    captions = [image["alt"] for image in page.of("img")]
    assert set(demo.FIGURES.values()) < set(captions) and "noise.png" in captions


@pytest.mark.faults
def test_what_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        analyze.main(["report", str(tmp_path)])
    assert "is not a run's output folder" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_every_image_and_reports_no_error(runs, tmp_path):
    page = build_report(runs[0], parts=["noise"])
    page.gallery([(np.full((30, 20, 3), 99, np.uint8), f"crop {i}") for i in range(30)])
    path = page.write(tmp_path / "report.html")
    with Browser(tmp_path / "profile") as browser:
        browser.open(path)
        widths = browser.evaluate("[...document.images].map(image => image.naturalWidth)")
        too_wide = browser.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        browser.screenshot(tmp_path / "report.png")
    assert len(widths) == 32 and min(widths) > 0
    assert too_wide == 0
    events = {(e["method"], json.dumps(e.get("params"))) for e in browser.events}
    errors = [e for e in events if e[0] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert not errors
    requests = [e["params"]["request"]["url"] for e in browser.events
                if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert all(url == path.as_uri() or url.startswith("data:") for url in requests)
    assert Image.open(tmp_path / "report.png").height > 800
