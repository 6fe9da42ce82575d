"""One training as a child process: an ordinary `train_net.py` command, its progress, its result."""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from tqdm import tqdm

from ..analysis.runs import final_metrics, read_metrics

#: What a result file has of a run's final metrics.
METRICS = ("AP", "AP50", "AP75", "AP-clean", "AP-ambiguous")


class TrainingFailed(RuntimeError):
    """A training ended with an error; the message has the end of its log."""


def training_command(config: str, opts: Sequence[str], folder, num_gpus: int = 0) -> List[str]:
    """The command, without the interpreter, to be run in the repository's root."""
    gpus = ["--num-gpus", str(num_gpus)] if num_gpus > 1 else []
    return [
        *("train_net.py", "--config-file", config, "--resume"),
        *gpus,
        *(*opts, "OUTPUT_DIR", str(folder)),
    ]


def train(
    root: Path,
    folder: Path,
    config: str,
    opts: Sequence[str],
    *,
    threads: Optional[int] = None,
    num_gpus: int = 0,
    position: int = 0,
) -> Path:
    """Run train_net.py unless the folder holds its finished result; show its progress.

    An interrupted training is resumed. A folder that was made by another command is refused, so
    that a result never belongs to settings that it was not made with.

    Args:
        root: the repository, where train_net.py lies.
        folder: OUTPUT_DIR.
        config: --config-file, relative to `root`.
        opts: KEY VALUE pairs.
        threads: of each process; None leaves the choice to PyTorch.
        num_gpus: of train_net.py.
        position: row of the progress bar, for several trainings at once.

    Returns:
        `folder`.

    Raises:
        TrainingFailed: it ended with an error.
        ValueError: the folder was made by another command.
    """
    folder = Path(folder)
    command = training_command(config, opts, folder, num_gpus)
    _refuse_other_command(folder, command)
    if is_finished(folder):
        tqdm.write(f"[{folder.name}] finished before, kept")
        return folder
    tqdm.write(f"$ {shlex.join(['python', *command])}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "command.json").write_text(json.dumps(command))
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    log = folder / "console.txt"
    with log.open("a") as stream:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=root,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            _follow(process, folder, position)
        finally:
            if process.poll() is None:  # Ctrl-C here: the training must not go on alone
                process.terminate()
                process.wait()
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise TrainingFailed(
            f"{folder.name} failed (exit {process.returncode}). End of {log}:\n{tail}"
        )
    return folder


def is_finished(folder: Path) -> bool:
    """Whether a training's final checkpoint and evaluation are there."""
    return Path(folder, "model_final.pth").exists() and "AP" in final_metrics(folder)


def _refuse_other_command(folder: Path, command: List[str]) -> None:
    path = folder / "command.json"
    if path.is_file() and (before := json.loads(path.read_text())) != command:
        raise ValueError(
            f"{folder} was made by another command: {shlex.join(before)}. Now it would be: "
            f"{shlex.join(command)}. Delete that folder, or write to another one."
        )


def _follow(process, folder: Path, position: int) -> None:
    """Show a bar while a training runs, from the records that it writes."""
    # disable=None: silent where standard error is no terminal.
    with tqdm(desc=folder.name, unit="step", position=position, leave=False, disable=None) as bar:
        while process.poll() is None:
            records = read_metrics(folder)
            if records:
                bar.n = records[-1]["iteration"] + 1
                losses = [r["total_loss"] for r in records if "total_loss" in r]
                bar.set_postfix(loss=f"{losses[-1]:.2f}" if losses else "-")
            time.sleep(1.0)


def summarize(folder: Path) -> Dict[str, float]:
    """A run's final metrics, as far as its evaluator gives them, and median seconds a step."""
    final = final_metrics(folder)
    result = {key.replace("-", "_"): round(final[key], 2) for key in METRICS if key in final}
    if seconds := [record["time"] for record in read_metrics(folder) if "time" in record]:
        result["seconds_per_step"] = round(statistics.median(seconds), 3)
    return result
