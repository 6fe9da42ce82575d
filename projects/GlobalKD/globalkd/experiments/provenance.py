"""What a result was made with: the code and the machine."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Optional

import detectron2
import torch
import torchvision


def commit(root: Path) -> str:
    """The checked-out commit, "+changes" behind it where the tree has any; or "unknown"."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"]
    try:
        text = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    except FileNotFoundError:  # no git
        text = ""
    return text.strip() or "unknown"


def processor() -> str:
    """The CPU's name: trainings repeat to the digit only on machines of one kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(*, threads: Optional[int] = None, jobs: int = 1) -> dict:
    """Hardware and versions.

    Args:
        threads: CPU threads of a training; None where PyTorch chose.
        jobs: trainings at a time.
    """
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": processor(),
        "cpu_cores": os.cpu_count(),
        "threads": threads,
        "jobs": jobs,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
    }
