"""What prototypes explain, discrepancy by choice of prototypes, and the gallery."""

import csv
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT

from globalkd.analysis.explained_share import explained_shares
from globalkd.analysis.gallery import MAX_NAME_WIDTH, _shortened, _strip, _text_width

sys.path.insert(0, str(ROOT / "tools"))
from analyze import main as analyze


class TestExplainedShares:
    def test_what_lies_in_the_span_is_explained_and_what_is_orthogonal_is_not(self):
        x = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
        atoms = torch.tensor([[2.0, 0.0, 0.0], [5.0, 5.0, 0.0]])
        expected = torch.tensor([[0.36, 1.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(explained_shares(x, atoms), expected)

    def test_equals_the_least_squares_residual(self):
        g = torch.Generator().manual_seed(0)
        x, atoms = torch.randn(20, 8, generator=g), torch.randn(3, 8, generator=g)
        fit = torch.linalg.lstsq(atoms.T.double(), x.T.double()).solution
        residual = x.double() - fit.T @ atoms.double()
        expected = 1 - residual.square().sum(1) / x.double().square().sum(1)
        torch.testing.assert_close(explained_shares(x, atoms)[:, -1], expected)

    def test_a_repeated_prototype_adds_nothing(self):
        g = torch.Generator().manual_seed(0)
        x, atoms = torch.randn(20, 8, generator=g), torch.randn(2, 8, generator=g)
        shares = explained_shares(x, torch.cat([atoms, -3 * atoms]))
        torch.testing.assert_close(shares[:, 1], shares[:, 3])
        assert (shares.diff(dim=1) >= 0).all()

    def test_more_prototypes_than_channels_explain_everything(self):
        g = torch.Generator().manual_seed(0)
        shares = explained_shares(torch.randn(5, 3, generator=g), torch.randn(6, 3, generator=g))
        torch.testing.assert_close(shares[:, 2:], torch.ones(5, 4, dtype=torch.float64))


@pytest.mark.slow
def test_discrepancy_of_a_run(untrained_run):
    analyze(["discrepancy", str(untrained_run), "--generators", "pursuit", "random"])
    folder = untrained_run / "discrepancy"
    rows = list(csv.DictReader((folder / "discrepancy.csv").open()))
    assert [(r["generator"], r["level"]) for r in rows] == [
        (g, level) for g in ("pursuit", "random") for level in ("p2", "p3", "p4", "p5", "p6")
    ]
    assert all(float(r["area"]) > 0 and float(r["median"]) > 0 for r in rows)
    assert all(0 <= float(r["auc"]) <= 1 for r in rows)
    bins = [r for r in csv.DictReader((folder / "histogram.csv").open()) if r["level"] == "p2"]
    first = [r for r in bins if r["generator"] == "pursuit"]
    total = sum(float(r["density"]) * (float(r["to"]) - float(r["from"])) for r in first)
    assert total == pytest.approx(1, abs=0.05)  # the last percentile lies beyond
    assert cv2.imread(str(folder / "discrepancy.png")).std() > 0


@pytest.mark.slow
def test_gallery_of_a_run(untrained_run):
    analyze(["gallery", str(untrained_run), "--levels", "p2", "p3", "--classes", "3", "7"])
    folder = untrained_run / "gallery"
    rows = list(csv.DictReader((folder / "gallery.csv").open()))
    assert {(r["level"], r["class"]) for r in rows} == {
        (level, name) for level in ("p2", "p3") for name in ("3", "7")
    }
    for row in rows:
        assert 0 < float(row["gain"]) <= 1 and 0 < float(row["explained_teacher"]) <= 1
    shares = [float(r["explained_teacher"]) for r in rows[:3]]
    assert [int(r["rank"]) for r in rows[:3]] == [1, 2, 3] and shares == sorted(shares)
    assert sorted(path.name for path in folder.iterdir()) == [
        "gallery.csv",
        "gallery.html",
        "gallery_p2.jpg",
        "gallery_p3.jpg",
    ]
    assert (folder / "gallery.html").read_text().count("data:image") == len(rows)


def test_a_long_class_name_is_seen_whole_or_ends_in_dots():
    assert _shortened("traffic light", MAX_NAME_WIDTH) == "traffic light"
    short = _shortened("traffic light", 50)
    assert _text_width(short) <= 50 and short.endswith("...") and short.startswith("tr")
    strip = _strip("traffic light", 120, [np.zeros((128, 128, 3), np.uint8)], 2)
    assert strip.shape == (64, 120 + 2 * 64, 3)
    assert not strip[1:63, 121:183].any() and (strip[:, 184:] == 255).all()


@pytest.mark.slow
@pytest.mark.faults
def test_an_unknown_class_is_named(untrained_run, capsys):
    with pytest.raises(SystemExit):
        analyze(["gallery", str(untrained_run), "--classes", "cat"])
    assert "--classes names ['cat']" in capsys.readouterr().err
