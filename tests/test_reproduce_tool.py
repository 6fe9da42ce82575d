"""The runner of tables: each training once, in the right folder, and failures by name."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import reproduce

TABLE = """
title: "{title}"
data: bccd
{results}
teacher: configs/bccd/teacher_R34.yaml
start: configs/bccd/start_R18.yaml
baseline: plain
rows:
  - {{name: plain, config: configs/bccd/student_R18.yaml, teacher: false}}
  - {{name: ours, config: configs/bccd/gkd_R34_R18.yaml}}
"""


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Calls the tool; trainings are replaced by a line in a list. Returns that list."""
    (tmp_path / "data/ImageSets/Main").mkdir(parents=True)
    for name, results in (("one", ""), ("two", ""), ("three", "results: elsewhere")):
        (tmp_path / f"{name}.yaml").write_text(TABLE.format(title=name, results=results))
    digits = TABLE.replace("data: bccd", "data: digits").format(title="digits", results="")
    (tmp_path / "digits.yaml").write_text(digits)
    trained = []

    def train(root, folder, config, opts, **kwargs):
        if Path(config).stem in failing:
            raise RuntimeError("out of memory")
        trained.append(str(folder.relative_to(tmp_path / "out")))

    failing = set()
    monkeypatch.setattr(reproduce, "TABLES", tmp_path)
    monkeypatch.setattr(reproduce, "train", train)
    monkeypatch.setattr(
        reproduce, "summarize", lambda folder: {"AP": 40.0, "seconds_per_step": 1.0}
    )

    def call(*tables, fail=(), args=()):
        failing.clear()
        failing.update(fail)
        trained.clear()
        where = ["--output", str(tmp_path / "out"), "--data", str(tmp_path / "data")]
        monkeypatch.setattr("sys.argv", ["reproduce.py", *tables, *where, *args])
        with pytest.raises(SystemExit) as end:
            reproduce.main()
        return list(trained), end.value.code

    call.results = tmp_path / "out/results"
    return call


def test_tables_of_one_folder_share_their_runs_and_finished_ones_stay(runner):
    trained, code = runner("one", "two", args=["--seeds", "2"])
    assert code == 0 and len(trained) == len(set(trained)) == 2 + 2 * 2
    assert all(name.startswith("bccd/") for name in trained)
    assert runner("one", "two", args=["--seeds", "2"]) == ([], 0)
    assert (runner.results.parent / "bccd/two.md").read_text().startswith("### two")


def test_a_table_may_have_a_folder_of_its_own(runner):
    one, _ = runner("one")
    three, _ = runner("three")
    assert [name.replace("bccd/", "elsewhere/", 1) for name in one] == three
    assert {path.name for path in (runner.results / "bccd").iterdir()} == {
        path.name for path in (runner.results / "elsewhere").iterdir()
    }


def test_a_result_says_how_it_was_made(runner):
    runner("one", args=["--jobs", "2"])
    results = [json.loads(p.read_text()) for p in (runner.results / "bccd").iterdir()]
    (ours,) = (r for r in results if "gkd" in r["config"])
    assert ours["teacher"].startswith("bccd-teacher") and ours["start"].startswith("bccd-start")
    assert len(ours["config_digest"]) == 12 and "train_net.py" in ours["command"]
    assert ours["metrics"] == {"AP": 40.0}  # trainings side by side say nothing about speed


def test_a_failure_is_named_with_what_needed_it_and_the_rest_is_run(runner, capsys):
    trained, code = runner("one", fail=["teacher_R34"])
    assert code == 1
    assert sorted(name.split("_")[0] for name in trained) == [
        "bccd/bccd-start",
        "bccd/bccd-student",
    ]
    said = capsys.readouterr().err
    assert "FAILED bccd-teacher_R34_seed1: out of memory" in said
    assert "bccd-gkd_R34_R18" in said and "what it needs has failed" in said


def test_data_in_the_repository_are_named_relative_to_it(runner, tmp_path, monkeypatch):
    """So that commands hold in another clone; a folder elsewhere has its whole path."""
    named = set()
    monkeypatch.setitem(reproduce.DATA, "bccd", lambda folder: named.add(str(folder)) or [])
    runner("one")
    runner("one", args=["--data", str(ROOT / "my/bccd")])
    assert named == {str(tmp_path / "data"), "my/bccd"}


def test_weights_that_a_missing_run_needs_are_made_again(runner):
    """A result file without its weights is a finished row, but no teacher."""
    runner("one")
    (gone,) = runner.results.glob("bccd/bccd-gkd*")
    gone.unlink()
    trained, _ = runner("one")
    names = [name.split("_")[0] for name in trained]
    assert sorted(names[:2]) == ["bccd/bccd-start", "bccd/bccd-teacher"]
    assert names[2:] == ["bccd/bccd-gkd"]


def test_one_folder_of_data_is_not_taken_for_two_data_sets(runner, capsys):
    assert runner("one", "digits") == ([], 2)
    assert "['bccd', 'digits']" in capsys.readouterr().err
