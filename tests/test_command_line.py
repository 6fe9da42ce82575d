"""What the commands have in common: `--import` of a user's own loss; mistakes in a sentence."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from conftest import NARROW, ROOT

from globalkd.analysis.runs import read_metrics
from globalkd.engine.command_line import import_modules

COMMANDS = (
    "tools/check.py",
    "tools/loss_scales.py",
    "tools/generate_prototypes.py",
    "tools/export_student.py",
    "tools/analyze.py",
    "demo/demo.py",
)
TOOLS = ("tools/loss_scales.py", "tools/generate_prototypes.py")
#: What a command demands beside --import. None of it is there: it is not read before the import.
ARGUMENTS = {
    "tools/generate_prototypes.py": ["--output", "x.safetensors", "--config-file", "x.yaml"],
    "tools/export_student.py": ["x"],
    "tools/analyze.py": ["x"],
    "demo/demo.py": ["--input", "x", "--output", "x", "--config-file", "x.yaml"],
}


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Working in an empty folder; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] in ("own_parts", "ends_here")]:
        del sys.modules[name]


def test_modules_lie_in_the_working_directory_and_are_imported_once(in_folder):
    (in_folder / "own_parts").mkdir()
    (in_folder / "own_parts/one.py").write_text("open('count', 'a').write('x')\n")
    import_modules([])
    assert str(in_folder) not in sys.path
    import_modules(["own_parts.one", "own_parts.one"])
    assert (in_folder / "count").read_text() == "x"


@pytest.mark.faults
def test_a_module_that_is_not_there_is_named(in_folder):
    (in_folder / "own_parts").mkdir()
    (in_folder / "own_parts/broken.py").write_text("import nowhere_else\n")
    for name, missing in (("gone.loss", "gone"), ("own_parts.gone", "own_parts.gone")):
        with pytest.raises(ValueError, match=f"--import {name}: there is no module '{missing}'"):
            import_modules([name])
    with pytest.raises(ValueError, match="must be a dotted name"):
        import_modules(["own_parts/broken.py"])
    with pytest.raises(ModuleNotFoundError, match="nowhere_else"):  # with its own traceback
        import_modules(["own_parts.broken"])


@pytest.fixture
def run_command(monkeypatch):
    """Runs a command as its file, with arguments, in this process."""

    def run(command, *arguments):
        spec = importlib.util.spec_from_file_location("command_under_test", ROOT / command)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
        return module.main()

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_before_it_reads_anything(command, in_folder, run_command):
    (in_folder / "ends_here.py").write_text("raise SystemExit('imported')\n")
    part = ["reliability"] if "analyze" in command else []
    arguments = ARGUMENTS.get(command, ["--config-file", "x.yaml"])
    with pytest.raises(SystemExit, match="imported"):
        run_command(command, *part, "--import", "ends_here", *arguments)


@pytest.mark.faults
@pytest.mark.parametrize(
    "command, option",
    [
        ("tools/check.py", "--steps"),
        ("tools/check.py", "--prototype-images"),
        ("tools/loss_scales.py", "--batches"),
        ("tools/export_student.py", "--images"),
        ("tools/reproduce.py", "--seeds"),
        ("tools/reproduce.py", "--jobs"),
        ("tools/demo.py", "--seeds"),
        ("tools/analyze.py noise", "--num-images"),
        ("tools/analyze.py compare", "--num-images"),
    ],
)
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_a_number_of_things_is_one_or_more(command, option, value, run_command, capsys):
    command, *part = command.split()
    with pytest.raises(SystemExit) as ended:
        run_command(command, *part, option, value)
    assert ended.value.code == 2
    message = f"argument {option}: it is '{value}'; it must be an integer of 1 or more"
    assert message in capsys.readouterr().err


@pytest.mark.faults
@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_module_is_named_in_a_sentence(command, in_folder, run_command, capsys):
    part = ["reliability"] if "analyze" in command else []
    arguments = ARGUMENTS.get(command, ["--config-file", "x.yaml"])
    with pytest.raises(SystemExit) as ended:
        run_command(command, *part, "--import", "own_parts.gone", *arguments)
    assert ended.value.code == 2
    assert "--import own_parts.gone: there is no module" in capsys.readouterr().err


@pytest.mark.faults
@pytest.mark.parametrize(
    "command, arguments",
    [("tools/plant_errors.py", ["x.json", "y.json"]), ("tools/reproduce.py", ["no_such_table"])],
)
def test_a_file_of_its_argument_is_named_in_a_sentence(
    command, arguments, in_folder, run_command, capsys
):
    with pytest.raises(SystemExit) as ended:
        run_command(command, *arguments)
    assert ended.value.code == 2
    assert re.search(r"x\.json|no_such_table", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.faults
def test_shares_of_more_than_all_annotations_are_refused_in_a_sentence(scenes, run_command, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("tools/plant_errors.py", scenes / "val.json", "x.json", "--label", 2)
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "the shares must be 0 or more and at most 1 together; got (2.0, 0.05, 0.05)" in said


@pytest.mark.faults
def test_prototypes_are_written_to_safetensors_alone(in_folder, run_command, capsys):
    """Refused before anything is read: there is no such configuration."""
    with pytest.raises(SystemExit) as ended:
        run_command("tools/generate_prototypes.py", "--config-file", "x.yaml", "--output", "p.txt")
    assert ended.value.code == 2
    assert "--output is 'p.txt'; it must end in .safetensors." in capsys.readouterr().err


@pytest.mark.faults
@pytest.mark.parametrize("command", TOOLS)
def test_a_config_that_does_not_distil_is_refused_in_a_sentence(
    command, run_command, tiny_cfg, tmp_path, capsys
):
    cfg = tiny_cfg("rcnn", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    (tmp_path / "plain.yaml").write_text(cfg.dump())
    output = ["--output", tmp_path / "p.safetensors"] if "prototypes" in command else []
    with pytest.raises(SystemExit) as ended:
        run_command(command, "--config-file", tmp_path / "plain.yaml", *output)
    assert ended.value.code == 2
    assert "META_ARCHITECTURE is GeneralizedRCNN" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.faults
@pytest.mark.parametrize("command", [*TOOLS, "tools/export_student.py", "demo/demo.py"])
def test_a_missing_file_is_named_in_a_sentence(command, in_folder, run_command, capsys):
    arguments = ARGUMENTS.get(command, ["--config-file", "x.yaml"])
    with pytest.raises(SystemExit) as ended:
        run_command(command, *arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "There is no " in message or "x/config.yaml" in message


@pytest.mark.slow
def test_every_process_of_a_training_has_the_loss_of_the_page(tiny_cfg, tmp_path):
    """As docs/own_loss.md says, from the user's own folder and on two processes."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own_loss.md").read_text(), re.DOTALL)
    (tmp_path / "my_project").mkdir()
    (tmp_path / "my_project/norm_loss.py").write_text(code)
    cfg = tiny_cfg("rcnn", *NARROW, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", ())
    cfg.MODEL.GLOBALKD.LOSSES = ["NormMatching"]
    (tmp_path / "config.yaml").write_text(cfg.dump())
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", "config.yaml"]
    command += ["--num-gpus", "2", "--dist-url", f"file://{tmp_path}/store"]
    result = subprocess.run(
        [*command, "--import", "my_project.norm_loss"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert any(record.get("loss_kd_norm", 0) > 0 for record in read_metrics(cfg.OUTPUT_DIR))
