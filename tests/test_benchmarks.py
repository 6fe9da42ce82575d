"""The benchmarks run in a tiny setting and measure what they say."""

import json
import sys

import pytest
import torch
from conftest import ROOT, TINY, make_batch

sys.path.insert(0, str(ROOT / "benchmarks"))
import evaluation_time
import step_time
import teacher_modes

SMALL = [str(x) for x in TINY]
ARGUMENTS = ["--device", "cpu", "--images", "2", "--rounds", "1", "--opts", *SMALL]


@pytest.mark.parametrize("detector", ["rcnn", "retinanet"])
def test_step_time_has_a_row_for_each_loss_of_the_detector(detector, tmp_path, capsys):
    file = tmp_path / "rows.json"
    options = ["--pairs", "R34-R18", "--detectors", detector, "--sizes", "64"]
    options += ["--losses", "GlobalKD", "FitNet", "RankMimicking", "--json", str(file)]
    rows = step_time.main([*options, *ARGUMENTS])
    expected = ["GlobalKD", "FitNet"] + ["RankMimicking"] * (detector == "retinanet")
    assert [row["loss"] for row in rows] == expected
    assert json.loads(file.read_text()) == rows
    for row in rows:
        floor = row["plain_s"] + row["teacher_s"]
        assert row["ratio"] == pytest.approx(row["distilled_s"] / floor)  # of a single round
        assert row["teacher"] == "R34" and row["student"] == "R18" and row["peak_bytes"] >= 0
    assert "over the floor" in capsys.readouterr().out


def test_the_plain_step_is_the_stock_detectors(capsys):
    case = step_time.Case("R34-R18", "rcnn", device="cpu", precision="fp32", opts=SMALL)
    step = case.distilled(["GlobalKnowledge", "FeatureKnowledge", "ResponseKnowledge"])
    batch = make_batch([3])
    torch.manual_seed(1)
    plain = case.plain(batch)
    torch.manual_seed(1)
    distilled = step(batch)
    assert not any(name.startswith("loss_kd") for name in plain)
    assert sum(name.startswith("loss_kd") for name in distilled) == 3
    for name, value in plain.items():
        torch.testing.assert_close(distilled[name], value)
    assert case.student.distiller is None


def test_teacher_modes_change_losses_only_where_they_compute_something_else(capsys):
    rows = teacher_modes.main(["--pair", "R34-R18", "--size", "64", *ARGUMENTS])
    changes = {row["way"]: row["change_of_losses"] for row in rows}
    assert changes["default"] == 0
    assert 0 < changes["PRECISION bf16"] < 0.5 and changes["INPUT_SCALE 0.5"] > 0


def test_both_coco_evaluations_agree(capsys):
    rows = evaluation_time.main(["--images", "6", "--detections", "20"])
    assert [row["detections"] for row in rows] == [120, 120]
    assert 0 < rows[0]["stats"][0] == pytest.approx(rows[1]["stats"][0])
