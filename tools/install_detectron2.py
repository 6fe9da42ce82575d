#!/usr/bin/env python
"""Make `import detectron2` work in this environment, from the package index alone.

Detectron2 is not published on the package index. A build that is already installed, of whatever
origin, is kept. Otherwise this script downloads one pinned wheel that carries a complete copy of
Detectron2 0.6 (Apache-2.0) under a prefix of its own, takes only that part, restores the import
name, and installs it as an ordinary pure-Python package: `pip uninstall detectron2` removes it.

Upstream's own build, with its compiled operators, is the alternative: install it first, and this
script leaves it alone.
"""

import argparse
import base64
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CARRIER = "LabGym==3.1.2"
CARRIER_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
PREFIX = "LabGym/detectron2/"
VERSION = "0.6"
LICENSE = Path(__file__).resolve().parent.parent / "LICENSE"
UPSTREAM = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)
METADATA = f"""Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: Detectron2 (pure-Python part), repackaged from {CARRIER}
Home-page: https://github.com/facebookresearch/detectron2
License: Apache-2.0
Requires-Dist: Pillow>=7.1
Requires-Dist: matplotlib
Requires-Dist: pycocotools>=2.0.2
Requires-Dist: termcolor>=1.1
Requires-Dist: yacs>=0.1.8
Requires-Dist: tabulate
Requires-Dist: cloudpickle
Requires-Dist: tqdm>4.29.0
Requires-Dist: tensorboard
Requires-Dist: fvcore<0.1.6,>=0.1.5
Requires-Dist: iopath<0.1.11,>=0.1.7
Requires-Dist: omegaconf<2.4,>=2.1
Requires-Dist: hydra-core>=1.1
Requires-Dist: black
Requires-Dist: packaging
Requires-Dist: setuptools<81
"""
WHEEL = "Wheel-Version: 1.0\nGenerator: globalkd\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def installed_version():
    """Version of the Detectron2 that this interpreter imports, or None where there is none."""
    probe = "import detectron2; print(detectron2.__version__)"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if result.returncode == 0:
        return result.stdout.strip()
    if "No module named 'detectron2'" in result.stderr:
        return None
    raise SystemExit(f"A detectron2 is installed but does not import:\n{result.stderr}")


def download_carrier(folder):
    """Let pip fetch the pinned wheel, so that the user's own index settings hold."""
    requirement = Path(folder, "carrier.txt")
    requirement.write_text(f"{CARRIER} --hash=sha256:{CARRIER_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    options = ["--ignore-requires-python", "--only-binary=:all:", "--dest", str(folder)]
    subprocess.run(pip + options + ["-r", str(requirement)], check=True)
    (wheel,) = Path(folder).glob("*.whl")
    return wheel


def repack(carrier, folder):
    """Write a proper detectron2 wheel with the files below PREFIX; return its path."""
    files = {}
    with zipfile.ZipFile(carrier) as archive:
        for name in archive.namelist():
            if name.startswith(PREFIX) and not name.endswith("/"):
                content = archive.read(name)
                if name.endswith((".py", ".yaml")):
                    content = content.replace(b"LabGym.detectron2", b"detectron2")
                files[name[len("LabGym/") :]] = content
    if "detectron2/__init__.py" not in files:
        raise SystemExit(f"{carrier.name} carries no {PREFIX}: the pinned wheel has changed.")
    info = f"detectron2-{VERSION}.dist-info"
    files[f"{info}/METADATA"] = METADATA.encode()
    files[f"{info}/WHEEL"] = WHEEL.encode()
    files[f"{info}/licenses/LICENSE"] = LICENSE.read_bytes()
    record = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in files.items()]
    files[f"{info}/RECORD"] = "\n".join(record + [f"{info}/RECORD,,", ""]).encode()
    wheel = Path(folder, f"detectron2-{VERSION}-py3-none-any.whl")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


def _digest(content):
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--wheel-dir", help="only write the wheel into this folder, install nothing"
    )
    args = parser.parse_args()
    if not args.wheel_dir:
        version = installed_version()
        if version:
            print(f"detectron2 {version} is installed already and is kept.")
            return
        print(f"Installing detectron2 {VERSION} from the copy in {CARRIER} (or first: {UPSTREAM})")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(args.wheel_dir or Path(folder, "out"))
        target.mkdir(parents=True, exist_ok=True)
        wheel = repack(download_carrier(folder), target)
        if args.wheel_dir:
            print(wheel)
            return
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", str(wheel)], check=True)


if __name__ == "__main__":
    main()
