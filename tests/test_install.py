"""tools/install_detectron2.py: what is there is kept; the repacked wheel is a proper one."""

import base64
import csv
import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import detectron2
import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "install_detectron2.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

INIT = b"from LabGym.detectron2.layers import x\n__version__ = '0.6'\n"
CARRIED = {
    "LabGym/detectron2/__init__.py": INIT,
    "LabGym/detectron2/layers/__init__.py": b"x = 1\n",
    "LabGym/detectron2/model_zoo/configs/Base.yaml": b"name: LabGym.detectron2.layers\n",
    "LabGym/detectron2/weights.bin": b"LabGym.detectron2\x00\xff",
}
OTHER = {
    "LabGym/__init__.py": b"other = True\n",
    "LabGym/detectron2_like.py": b"other = True\n",
    "labgym-3.dist-info/RECORD": b"",
}


def make_wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("LabGym/detectron2/", b"")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def read(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def wheel(tmp_path):
    carrier = make_wheel(tmp_path / "carrier.whl", {**CARRIED, **OTHER})
    return tool.repack(carrier, tmp_path)


def run_python(monkeypatch, tmp_path, options):
    """Let the tool probe an interpreter that gets these options."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" {options} "$@"\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(tool.sys, "executable", str(interpreter))


def test_wheel_holds_the_carried_files_under_their_own_name_and_nothing_else(wheel):
    files = read(wheel)
    package = {name for name in files if not name.startswith("detectron2-0.6.dist-info/")}
    assert package == {name.removeprefix("LabGym/") for name in CARRIED}


def test_prefix_is_rewritten_in_text_and_left_alone_in_data(wheel):
    files = read(wheel)
    expected = INIT.replace(b"LabGym.detectron2", b"detectron2")
    assert files["detectron2/__init__.py"] == expected
    assert files["detectron2/model_zoo/configs/Base.yaml"] == b"name: detectron2.layers\n"
    assert files["detectron2/weights.bin"] == CARRIED["LabGym/detectron2/weights.bin"]


def test_record_lists_every_file_with_its_hash_and_size(wheel):
    files = read(wheel)
    record = "detectron2-0.6.dist-info/RECORD"
    rows = {row[0]: row[1:] for row in csv.reader(files[record].decode().splitlines())}
    assert set(rows) == set(files)
    assert rows.pop(record) == ["", ""]
    for name, (digest, size) in rows.items():
        sha256 = hashlib.sha256(files[name]).digest()
        assert digest == "sha256=" + base64.urlsafe_b64encode(sha256).decode().rstrip("=")
        assert int(size) == len(files[name])


def test_wheel_carries_the_licence_and_says_where_it_comes_from(wheel):
    files = read(wheel)
    assert b"Apache License" in files["detectron2-0.6.dist-info/licenses/LICENSE"]
    metadata = files["detectron2-0.6.dist-info/METADATA"].decode()
    assert "Name: detectron2\nVersion: 0.6\n" in metadata
    assert tool.CARRIER in metadata


def test_pip_installs_the_wheel_and_it_imports(wheel, tmp_path):
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True)
    code = "import detectron2; print(detectron2.x, detectron2.__file__)"
    environment = {"PYTHONPATH": str(target)}
    found = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    assert found.split() == ["1", str(target / "detectron2" / "__init__.py")]


def test_carrier_without_detectron2_is_refused_by_name(tmp_path):
    carrier = make_wheel(tmp_path / "other.whl", OTHER)
    with pytest.raises(SystemExit, match="other.whl carries no LabGym/detectron2/"):
        tool.repack(carrier, tmp_path)
    assert not list(tmp_path.glob("detectron2-*.whl"))


def test_pinned_hash_reaches_pip(tmp_path, monkeypatch):
    def fake_pip(command, check):
        assert check and {"--require-hashes", "--no-deps"} <= set(command)
        requirement = Path(command[command.index("-r") + 1]).read_text()
        assert requirement == f"{tool.CARRIER} --hash=sha256:{tool.CARRIER_SHA256}\n"
        make_wheel(tmp_path / "carrier.whl", CARRIED)

    monkeypatch.setattr(tool.subprocess, "run", fake_pip)
    assert tool.download_carrier(tmp_path) == tmp_path / "carrier.whl"


def test_present_detectron2_is_found_with_its_version():
    assert tool.installed_version() == detectron2.__version__


def test_absent_detectron2_is_none(monkeypatch, tmp_path):
    run_python(monkeypatch, tmp_path, "-I -S")  # without site-packages
    assert tool.installed_version() is None


def test_broken_detectron2_is_shown_and_not_replaced(monkeypatch, tmp_path):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("raise ImportError('no libtorch')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match="does not import:[^~]*no libtorch"):
        tool.installed_version()


def test_present_detectron2_is_kept_without_any_download(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["install_detectron2.py"])
    monkeypatch.setattr(tool, "download_carrier", lambda folder: pytest.fail("downloaded"))
    tool.main()
    assert "is kept" in capsys.readouterr().out


def test_wheel_is_only_written_where_a_folder_is_given(monkeypatch, tmp_path, capsys):
    carrier = make_wheel(tmp_path / "carrier.whl", CARRIED)
    monkeypatch.setattr(tool, "download_carrier", lambda folder: carrier)
    monkeypatch.setattr(tool.subprocess, "run", lambda *_, **__: pytest.fail("installed"))
    folder = tmp_path / "new" / "wheels"
    monkeypatch.setattr(sys, "argv", ["install_detectron2.py", "--wheel-dir", str(folder)])
    tool.main()
    assert capsys.readouterr().out.split() == [str(folder / "detectron2-0.6-py3-none-any.whl")]


def test_a_missing_detectron2_is_said_in_one_sentence_with_both_ways():
    code = "import sys; sys.modules['detectron2'] = None; import globalkd"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: globalkd needs Detectron2")
    assert "tools/install_detectron2.py" in last and "git+https://github.com" in last
