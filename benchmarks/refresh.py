#!/usr/bin/env python
"""Refresh by a pass and by harvest, side by side on one training run: time and what they choose.

    benchmarks/refresh.py --config-file configs/quick/gkd_R34_R18.yaml --steps 125 [KEY VALUE ...]

Trains with PROTOTYPES.REFRESH harvest for --steps iterations, then makes prototypes in both ways
with the student of that moment. "explained" is the share of the dataset's instance features that
lies in the span of the prototypes of their class, averaged over instances and levels: the pass
chooses among just these features, with an older student the harvest.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from detectron2.engine import TrainerBase
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from globalkd import register_datasets
from globalkd.analysis.annotations import training_instances
from globalkd.analysis.explained_share import explained_shares
from globalkd.config_reading import fall_back_to_cpu, load_config
from globalkd.engine.trainer import DistillTrainer


def timed(function, seconds):
    """The function, with the duration of each call appended to a list."""

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        return result

    return wrapper


def explained(bank, features):
    """Space -> mean share of the features that the prototypes of their class and level explain."""
    shares = {}
    for space in ("teacher", "student"):
        found = []
        for name, level in bank.levels.items():
            atoms = getattr(level, f"{space}_prototypes").cpu()
            for k in features.classes.unique().tolist():
                x = getattr(features, space)[name][features.classes == k]
                found.append(explained_shares(x, atoms[k][level.valid[k].cpu()])[:, -1])
        shares[space] = float(torch.cat(found).mean())
    return shares


def setup(args):
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.GLOBALKD.PROTOTYPES.REFRESH = "harvest"
    cfg.DATASETS.TEST = ()
    fall_back_to_cpu(cfg)
    register_datasets(cfg)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    setup_logger(cfg.OUTPUT_DIR, name="globalkd")
    return cfg


def table(results):
    """Results for people, as Markdown: two lines each, one for each way to refresh."""
    lines = []
    for r in results:
        for way in ("pass", "harvest"):
            harvesting = f"{r['harvest_per_step_s']:.3f} s" if way == "harvest" else "-"
            explained = r["explained"][way]
            lines.append(
                {
                    "`PROTOTYPES.REFRESH`": f"`{way}`",
                    "a step": f"{r['step_s']:.2f} s",
                    "of it harvesting": harvesting,
                    "a refresh": f"{r[f'{way}_refresh_s']:.2f} s",
                    "share of training, one refresh an epoch": f"{r[f'{way}_share']:.1%}",
                    "explained, teacher and student": (
                        f"{explained['teacher']:.3f}, {explained['student']:.3f}"
                    ),
                }
            )
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="a distilling configuration")
    parser.add_argument("--steps", type=int, default=125, help="training iterations before")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    args = parser.parse_args()
    trainer = DistillTrainer(setup(args))
    trainer.resume_or_load(resume=False)
    distiller, model = trainer.distiller, trainer.model
    adding, steps = [], []
    distiller._harvest = timed(distiller._harvest, adding)
    trainer.run_step = timed(trainer.run_step, steps)
    TrainerBase.train(trainer, 0, args.steps)

    refresher, bank = distiller.refresher, distiller.bank
    harvest, full_pass = [], []
    timed(refresher.refresh_from, harvest)(distiller.reservoir, bank, args.steps)
    banks = {"harvest": copy.deepcopy(bank)}
    timed(distiller.refresh, full_pass)(model)
    banks["pass"] = bank
    _, features = training_instances(model)

    step, add = statistics.median(steps), statistics.median(adding)
    epoch = refresher.epoch_iters * step
    result = {
        "step_s": step,
        "harvest_per_step_s": add,
        "harvest_refresh_s": harvest[0],
        "pass_refresh_s": full_pass[0],
        "harvest_share": (add * refresher.epoch_iters + harvest[0]) / epoch,
        "pass_share": full_pass[0] / epoch,
        "instances_harvest": len(distiller.reservoir.features(0)),
        "instances_pass": len(features),
        "explained": {name: explained(b, features) for name, b in banks.items()},
    }
    print(f"{table([result])}\n{json.dumps(result, indent=1)}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
