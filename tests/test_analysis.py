"""Looking at runs: loading, reliability of annotations, the demo's table and pictures."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from globalkd.analysis.annotations import Annotations, dataset_annotations
from globalkd.analysis.curves import draw_curves
from globalkd.analysis.demo_figures import draw_detections, draw_reliability
from globalkd.analysis.reliability import (
    ambiguity_auc,
    level_reliability,
    reliability_report,
)
from globalkd.analysis.runs import load_run, read_config, read_metrics
from globalkd.data import register_datasets
from globalkd.engine.trainer import DistillTrainer
from globalkd.experiments.tables import COLUMNS, render_detectors


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    score, ambiguous = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.4
    pairs = [
        (low < high) + 0.5 * (low == high) for low in score[ambiguous] for high in score[~ambiguous]
    ]
    assert ambiguity_auc(score, ambiguous) == pytest.approx(np.mean(pairs))


def test_auc_is_one_for_perfect_and_undefined_without_both_kinds():
    assert ambiguity_auc(np.array([0.1, 0.9]), np.array([True, False])) == 1.0
    assert np.isnan(ambiguity_auc(np.array([0.1, 0.9]), np.array([True, True])))


@pytest.mark.faults
def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run's output folder"):
        read_config(tmp_path)
    assert read_metrics(tmp_path) == []


def test_the_table_gives_mean_and_spread_over_seeds():
    one = {column: [10.0] for column in COLUMNS}
    two = {column: [10.0, 20.0] for column in COLUMNS}
    lines = render_detectors({"teacher": one, "plain": two, "distilled": two}).splitlines()
    assert len(lines) == 5 and all(line.count("|") == len(COLUMNS) + 2 for line in lines)
    assert "| 10.00 |" in lines[2] and "15.00 ± 7.07" in lines[3]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, request):
    """The folder of one tiny finished run."""
    return tmp_path_factory.mktemp("distilled")


@pytest.fixture
def run(tiny_cfg, distilled):
    if not Path(distilled, "model_final.pth").exists():
        cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 21, "OUTPUT_DIR", str(distilled))
        Path(distilled, "config.yaml").write_text(cfg.dump())
        register_datasets(cfg)
        torch.manual_seed(0)
        DistillTrainer(cfg).train()
    return distilled


@pytest.mark.slow
def test_every_annotation_gets_a_weight(run):
    model = load_run(run, distiller=True)
    annotations = dataset_annotations(model, read_config(run).DATASETS.TEST[0])
    ambiguous = annotations.field("ambiguity", 0) > 0
    kinds = annotations.field("ambiguity_kind", "")
    assert len(annotations.features) == len(ambiguous) == len(kinds) > 0
    for weight in level_reliability(model, annotations.features).values():
        assert (weight >= 0).all() and (weight <= 1).all()
    assert (ambiguous == (kinds != "none")).all()


@pytest.mark.slow
def test_both_weights_are_measured_with_the_same_prototypes(run):
    model = load_run(run, distiller=True)
    dataset = read_config(run).DATASETS.TEST[0]
    rows = {(row["type"], row["level"]): row for row in reliability_report(model, dataset)}
    levels = ["p2", "p3", "p4", "p5", "p6", "mean"]
    assert list(rows) == [(t, level) for t in ("coefficients", "max_cosine") for level in levels]

    annotations = dataset_annotations(model, dataset)
    ambiguous = annotations.field("ambiguity", 0) > 0
    weight = level_reliability(model, annotations.features, "max_cosine")["p3"]
    row = rows["max_cosine", "p3"]
    assert row["auc"] == pytest.approx(ambiguity_auc(weight, ambiguous))
    assert row["ambiguous"] == pytest.approx(weight[ambiguous].mean())
    assert rows["coefficients", "p3"]["clean"] != pytest.approx(row["clean"])


@pytest.mark.slow
@pytest.mark.faults
def test_reliability_needs_a_dataset_that_knows_the_ambiguous_ones(run, monkeypatch):
    model, dataset = load_run(run, distiller=True), read_config(run).DATASETS.TEST[0]
    monkeypatch.setattr(Annotations, "field", lambda self, *_: np.full(len(self), np.nan))
    with pytest.raises(ValueError, match="does not say which annotations are ambiguous"):
        reliability_report(model, dataset)


@pytest.mark.slow
@pytest.mark.faults
def test_a_plain_checkpoint_has_no_distiller(run, tmp_path):
    plain = torch.load(Path(run, "model_final.pth"))
    del plain["distiller"]
    torch.save(plain, Path(run, "plain.pth"))
    with pytest.raises(ValueError, match="holds no distiller"):
        load_run(run, "plain.pth", distiller=True)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_run(run, "nowhere.pth")


@pytest.mark.slow
def test_weights_older_than_the_runs_last_are_said_to_be(run, caplog):
    load_run(run)
    assert "older than" not in caplog.text
    Path(run, "last_checkpoint").write_text("model_0000051.pth")
    load_run(run)
    assert "older than the run's last checkpoint, model_0000051.pth" in caplog.text


@pytest.mark.slow
def test_the_pictures_are_drawn(run, tmp_path):
    draw_curves(tmp_path / "curves.png", {"plain": [run], "distilled": [run]})
    draw_detections(tmp_path / "detections.png", {"plain": run, "distilled": run}, count=2)
    auc = draw_reliability(tmp_path / "reliability.png", run)
    assert set(auc) == {"p2", "p3", "p4", "p5", "p6"}
    for name in ("curves", "detections", "reliability"):
        assert cv2.imread(str(tmp_path / f"{name}.png")).std() > 0
