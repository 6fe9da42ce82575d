"""Tables of experiments: definitions, the runs they need, resuming, and how they are shown."""

import csv
import io
import json
import math
import sys
from pathlib import Path

import pytest

from globalkd.experiments.figures import draw_table, drawn_from
from globalkd.experiments.matrix import Run, config_digest, load_table
from globalkd.experiments.tables import (
    paired_difference,
    render_csv,
    render_markdown,
    render_summary,
)
from globalkd.experiments.training import TrainingFailed, is_finished, summarize, train

ROOT = Path(__file__).resolve().parent.parent
TABLES = sorted((ROOT / "results/tables").glob("*.yaml"))

DEFINITION = """
title: "Small"
data: digits
teacher: configs/t.yaml
start: configs/s.yaml
baseline: plain
paper: "AP, elsewhere"
rows:
  - {name: teacher, config: configs/t.yaml, start: false}
  - {name: plain, config: configs/p.yaml, teacher: false}
  - {name: ours, config: configs/d.yaml, opts: [KEY, 2], paper: 40.5}
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(DEFINITION)
    return load_table(path, seeds=3)


def results_of(table, values):
    """Result files' contents for a table: row name -> AP by seed."""
    rows = {row.name: row for row in table.rows}
    return {
        rows[name].runs[seed].name: {"metrics": {"AP": ap}, "commit": "c", "command": f"train {ap}"}
        for name, aps in values.items()
        for seed, ap in enumerate(aps, 1)
    }


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_table_is_made_of_configs_that_exist(path):
    runs = load_table(path, seeds=2).runs()
    assert all((ROOT / run.config).is_file() for run in runs)
    assert len({run.name for run in runs}) == len(runs)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_rows_of_a_table_differ(path):
    table = load_table(path, seeds=1)
    defaults = ("epochs", "= 1.0", "P = 10", "lambda = 10.0", "weight = 5.0")  # written out
    names = [r.runs[1].name for r in table.rows if not any(d in r.name for d in defaults)]
    assert len(set(names)) == len(names)


def test_students_share_the_teacher_and_the_start(table):
    runs = table.runs()
    assert [run.config for run in runs].count("configs/t.yaml") == 1
    assert [run.config for run in runs].count("configs/s.yaml") == 1
    assert len(runs) == 1 + 1 + 3 + 3
    plain, ours = table.rows[1].runs[2], table.rows[2].runs[2]
    assert plain.start == ours.start and plain.teacher is None
    output = Path("/out")
    assert ours.options(output) == [
        *("SEED", "2", "KEY", "2", "MODEL.WEIGHTS", f"/out/{ours.start.name}/model_final.pth"),
        *("MODEL.GLOBALKD.TEACHER.WEIGHTS", f"/out/{ours.teacher.name}/model_final.pth"),
    ]


def test_what_is_needed_comes_first(table):
    seen = set()
    for run in table.runs():
        assert all(needed.name in seen for needed in (run.teacher, run.start) if needed)
        seen.add(run.name)


def test_a_teacher_and_a_start_may_have_starts_of_their_own(tmp_path):
    path = tmp_path / "chain.yaml"
    text = DEFINITION.replace(
        "teacher: configs/t.yaml", "teacher: {config: configs/t.yaml, start: configs/backbone.yaml}"
    )
    text = text.replace(
        "start: configs/s.yaml", "start: {config: configs/s.yaml, start: configs/small.yaml}"
    )
    path.write_text(text)
    table = load_table(path, seeds=2)
    ours = table.rows[2].runs[2]
    assert table.rows[0].runs[1] == ours.teacher
    assert ours.teacher.start == Run("configs/backbone.yaml", 1)
    assert ours.start.start == Run("configs/small.yaml", 1)
    assert [run.depth for run in table.runs()] == [0, 0, 1, 1, 2, 2, 2, 2]
    path.write_text(text.replace("start: configs/small.yaml", "strat: configs/small.yaml"))
    with pytest.raises(ValueError, match="unknown keys \\['strat'\\]"):
        load_table(path, seeds=1)


def test_overrides_of_a_table_come_before_those_of_its_trainings(tmp_path):
    path = tmp_path / "overridden.yaml"
    text = DEFINITION.replace(
        "teacher: configs/t.yaml",
        "opts: [SIZE, 8]\nteacher: {config: configs/t.yaml, opts: [DEPTH, 101]}",
    )
    text = text.replace(
        "start: configs/s.yaml",
        "start: {config: configs/s.yaml, opts: [WEIGHTS, ''], start: configs/small.yaml}",
    )
    path.write_text(text)
    teacher, plain, ours = (row.runs[1] for row in load_table(path, seeds=1).rows)
    assert ours.teacher == teacher == Run("configs/t.yaml", 1, ("SIZE", "8", "DEPTH", "101"))
    assert plain.opts == ("SIZE", "8") and ours.opts == ("SIZE", "8", "KEY", "2")
    assert (
        plain.start
        == ours.start
        == Run(
            "configs/s.yaml",
            1,
            ("SIZE", "8", "WEIGHTS", ""),
            start=Run("configs/small.yaml", 1, ("SIZE", "8")),
        )
    )
    path.write_text(DEFINITION)
    without = {run.name for run in load_table(path, seeds=1).runs()}
    assert not without & {run.name for run in ours.needs + [plain, ours]}


def test_a_value_of_overrides_may_be_a_list(tmp_path):
    path = tmp_path / "nested.yaml"
    row = "opts: [SIZES, [[8], [16]], TEACHER.OPTS, [DEPTH, 101, WEIGHTS, '']]"
    path.write_text(DEFINITION.replace("opts: [KEY, 2]", row))
    ours = load_table(path, seeds=1).rows[2].runs[1]
    assert ours.opts == ("SIZES", "[[8], [16]]", "TEACHER.OPTS", "['DEPTH', 101, 'WEIGHTS', '']")


def test_a_runs_name_tells_every_difference():
    runs = [
        Run("configs/a/b.yaml", 1),
        Run("configs/a/b.yaml", 2),
        Run("configs/a/b.yaml", 1, ("K", "1")),
        Run("configs/a/b.yaml", 1, teacher=Run("configs/t.yaml", 1)),
        Run("configs/a/b.yaml", 1, start=Run("configs/s.yaml", 1)),
    ]
    assert len({run.name for run in runs}) == len(runs)
    assert runs[0].name == "a-b_seed1"


def test_the_paired_interval_is_students_t():
    found = paired_difference([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])  # differences 1, 2, 3
    assert found["mean"] == 2
    assert found["half_width"] == pytest.approx(4.30265 * 1 / math.sqrt(3), rel=1e-4)
    assert math.isnan(paired_difference([1.0], [2.0])["half_width"])


def test_the_table_shows_means_pairs_and_the_papers_number(table):
    results = results_of(table, {"teacher": [70.0], "plain": [40, 44, 48], "ours": [43, 46, 49]})
    text = render_markdown(table, results)
    assert "| teacher | 70.00 |  |  |" in text
    assert "| plain | 44.00 ± 4.00 |" in text
    assert "| ours | 46.00 ± 3.00 | +2.00 ± 2.48 | 40.5 |" in text
    assert "Not run yet" not in text


def test_a_teacher_is_no_pair_of_a_student(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(DEFINITION)
    table = load_table(path, seeds=1)
    text = render_markdown(table, results_of(table, {"teacher": [70], "plain": [40], "ours": [43]}))
    assert "| teacher | 70.00 |  |  |" in text
    assert "| ours | 43.00 | +3.00 | 40.5 |" in text


def test_a_picture_says_what_it_was_drawn_from(table, tmp_path):
    path = tmp_path / "small.png"
    results = results_of(table, {"teacher": [70.0], "plain": [40, 44, 48], "ours": [43]})
    assert not drawn_from(path, table, results)
    draw_table(path, table, results)
    assert drawn_from(path, table, results)
    assert not drawn_from(path, table, results_of(table, {"plain": [40, 44, 48], "ours": [43]}))
    draw_table(path, table, {})  # nothing was run yet
    assert drawn_from(path, table, {})


def test_what_was_not_run_is_said(table):
    results = results_of(table, {"teacher": [70.0], "plain": [40, 44, 48], "ours": [43]})
    text = render_markdown(table, results)
    assert "Not run yet: ours (seeds [2, 3])" in text
    assert "| ours | 43.00 |  |" in text  # no difference from pairs that are not there


SWEEP = (
    DEFINITION
    + """sweep: {key: WEIGHT, values: [1, 0.3], opts: [SPLIT, val]}
"""
)


@pytest.fixture
def sweep(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP)
    return load_table(path, seeds=2)


def test_a_sweep_runs_rows_with_a_teacher_once_for_each_value(sweep, table):
    assert [row.name for row in sweep.rows] == [
        *("teacher", "plain", "ours, WEIGHT 1", "ours, WEIGHT 0.3")
    ]
    assert sweep.rows[3].runs[2].opts == ("KEY", "2", "SPLIT", "val", "WEIGHT", "0.3")
    assert sweep.rows[1].runs[1] == table.rows[1].runs[1]
    assert sweep.rows[3].runs[1].teacher == table.rows[0].runs[1]


def test_a_sweep_is_shown_by_rows_and_values(sweep):
    found = {"plain": [40, 44], "ours, WEIGHT 1": [43, 45], "ours, WEIGHT 0.3": [46]}
    text = render_markdown(sweep, results_of(sweep, found))
    assert "| AP, by `WEIGHT` | 1 | 0.3 |\n|---|---|---|" in text
    assert "| plain: 42.00 ± 2.83 |  |  |" in text
    assert "| ours | 44.00 ± 1.41 | **46.00** |" in text
    assert "Not run yet: teacher (seeds [1]), ours, WEIGHT 0.3 (seeds [2])." in text
    assert "paired" not in text


def test_a_row_of_a_sweep_may_have_values_of_its_own(tmp_path):
    path = tmp_path / "sweep.yaml"
    ours = "  - {name: ours, config: configs/d.yaml, values: [1, 3]}"
    other = "  - {name: other, config: configs/d.yaml, opts: [KEY, 2], values: [3, 9]}"
    path.write_text("\n".join([*SWEEP.splitlines()[:-2], ours, other, *SWEEP.splitlines()[-1:]]))
    table = load_table(path, seeds=1)
    assert [row.swept for row in table.rows[2:]] == [
        *(("ours", 1), ("ours", 3), ("other", 3), ("other", 9))
    ]
    found = {"plain": [40], "ours, WEIGHT 1": [43], "other, WEIGHT 9": [45]}
    text = render_markdown(table, results_of(table, found))
    assert "| AP, by `WEIGHT` | 1 | 3 | 9 |\n" in text
    assert "| ours | **43.00** | - |  |" in text  # 3 was planned and not run, 9 was not planned
    assert "| other |  | - | **45.00** |" in text


def test_csv_has_a_line_for_each_run(table):
    results = results_of(table, {"plain": [40, 44, 48], "ours": [43]})
    lines = list(csv.DictReader(io.StringIO(render_csv(table, results))))
    assert [(line["row"], line["seed"], line["AP"]) for line in lines] == [
        *(("plain", str(s), ap) for s, ap in ((1, "40"), (2, "44"), (3, "48"))),
        ("ours", "1", "43"),
    ]
    assert lines[-1]["command"] == "train 43"


@pytest.mark.faults
@pytest.mark.parametrize(
    "change, message",
    [
        (("title:", "titel:"), "unknown keys \\['titel'\\]"),
        (("baseline: plain", "baseline: other"), "baseline is 'other'"),
        (("config: configs/d.yaml, ", ""), "row 'ours': lacks \\['config'\\]"),
        (("name: ours", "name: plain"), "names must differ"),
        (("title:", "sweep: {key: K}\ntitle:"), "sweep: lacks \\['values'\\]"),
        (("name: ours", "values: [1], name: ours"), "row 'ours' has 'values', which are of a"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, change, message):
    path = tmp_path / "small.yaml"
    path.write_text(DEFINITION.replace(*change))
    with pytest.raises(ValueError, match=message):
        load_table(path, seeds=1)


@pytest.mark.faults
def test_an_unknown_table_lists_the_known(tmp_path):
    (tmp_path / "small.yaml").write_text(DEFINITION)
    with pytest.raises(FileNotFoundError, match="no table 'large'. There are: small"):
        load_table(tmp_path / "large.yaml", seeds=1)


FAKE_TRAINING = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("OUTPUT_DIR") + 1])
calls = folder / "calls"
calls.write_text((calls.read_text() if calls.exists() else "") + "x")
if "FAIL" in sys.argv:
    sys.exit("no such key: FAIL")
records = [{"iteration": 9, "time": t, "total_loss": 1.0} for t in (1.0, 2.0, 9.0)]
records.append({"iteration": 10, "bbox/AP": 12.345, "bbox/AP50": 30.0})
(folder / "metrics.json").write_text("".join(json.dumps(r) + "\\n" for r in records))
(folder / "model_final.pth").touch()
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "train_net.py").write_text(FAKE_TRAINING)
    return tmp_path


def test_a_finished_training_is_kept(root):
    folder = train(root, root / "run", "c.yaml", ["SEED", "1"])
    train(root, folder, "c.yaml", ["SEED", "1"])
    assert (folder / "calls").read_text() == "x" and is_finished(folder)
    assert summarize(folder) == {"AP": 12.35, "AP50": 30.0, "seconds_per_step": 2.0}


def test_an_unfinished_training_goes_on(root):
    folder = train(root, root / "run", "c.yaml", [])
    (folder / "model_final.pth").unlink()
    train(root, folder, "c.yaml", [])
    assert (folder / "calls").read_text() == "xx"


def test_a_training_that_was_interrupted_before_its_evaluation_has_metrics_without_a_time(root):
    folder = train(root, root / "run", "c.yaml", [])
    (folder / "metrics.json").write_text('{"iteration": 10, "bbox/AP": 12.345}\n')
    assert summarize(folder) == {"AP": 12.35}


@pytest.mark.faults
def test_a_folder_of_another_command_is_refused(root):
    folder = train(root, root / "run", "c.yaml", ["SEED", "1"])
    with pytest.raises(ValueError, match="made by another command: .*SEED 1"):
        train(root, folder, "c.yaml", ["SEED", "2"])


@pytest.mark.faults
def test_a_failed_training_shows_the_end_of_its_log(root):
    with pytest.raises(TrainingFailed, match="run failed \\(exit 1\\).*\n.*no such key: FAIL"):
        train(root, root / "run", "c.yaml", ["FAIL", "1"])


def test_the_pages_of_results_say_what_the_result_files_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    sys.modules.pop("results", None)
    import results

    assert results.PAGE.read_text() == results.render_page()
    for page in results.FILLED:
        text = page.read_text()
        assert results.BLOCK.search(text) and text == results.fill(text)
    assert not list(results.undrawn())


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/*.json")), ids=lambda p: p.stem)
def test_a_result_file_is_complete(path):
    result = json.loads(path.read_text())
    assert {"config", "seed", "command", "commit", "machine", "metrics"} <= set(result)
    assert str(ROOT) not in path.read_text() and "/tmp/" not in path.read_text()
    assert "+changes" not in result["commit"]


def test_a_result_of_a_changed_configuration_is_said_to_be(table, tmp_path):
    (tmp_path / "configs").mkdir()
    base, config = tmp_path / "configs/base.yaml", tmp_path / "configs/d.yaml"
    base.write_text("SOLVER:\n  BASE_LR: 0.1\nOUTPUT_DIR: here\n")
    config.write_text("_BASE_: base.yaml\nSEED: 3\n")
    results = results_of(table, {"plain": [1, 2, 3], "ours": [4, 5, 6]})
    results[table.rows[2].runs[2].name]["config_digest"] = config_digest(config)
    said = "Of an earlier version of their configuration: ours."

    def render():
        return render_markdown(table, results, tmp_path)

    assert said not in render()
    base.write_text("# a comment\nOUTPUT_DIR: there\nSOLVER: {BASE_LR: 0.1}\n")
    assert said not in render()
    base.write_text("SOLVER:\n  BASE_LR: 0.2\n")
    assert said in render()
    assert said not in render_markdown(table, results)


def test_a_summary_has_one_line_a_table(table):
    results = results_of(table, {"teacher": [50], "plain": [30, 31, 32], "ours": [35, 37, 39]})
    text = render_summary({"Small": (table, results)}, ["teacher", "other", "plain", "ours"])
    assert text.splitlines() == [
        "| AP | teacher | other | plain | ours |",
        "|---|---|---|---|---|",
        "| Small | 50.00 | - | 31.00 ± 1.00 | 37.00 ± 2.00<br>+6.00 ± 2.48 |",
    ]


def test_no_difference_where_the_baseline_lacks_a_seed(table):
    results = results_of(table, {"plain": [30, 31], "ours": [35, 37, 39]})
    text = render_markdown(table, results)
    assert "37.00 ± 2.00 |  |" in text and "plain (seeds [3])" in text


def test_a_summary_says_which_seeds_a_row_has(table):
    results = results_of(table, {"plain": [30, 31, 32], "ours": [35, 37]})
    text = render_summary({"Small": (table, results)}, ["plain", "ours"])
    assert "| 36.00 ± 1.41 (seeds [1, 2]) |" in text


def test_a_row_of_the_teachers_config_with_other_opts_is_refused(tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text(
        "{title: t, data: d, baseline: a, teacher: {config: T, opts: [SEED, 1]},"
        " rows: [{name: a, config: T, opts: [SEED, 2]}]}"
    )
    with pytest.raises(ValueError, match="row 'a' has the teacher's config and other opts"):
        load_table(path, 1)
