#!/usr/bin/env python
"""What distillation costs: plain student step, teacher pass, distilled step, in turn.

    benchmarks/step_time.py --json benchmarks/results/step_time_cpu.json
    benchmarks/step_time.py --pairs R101-R50 --detectors rcnn --sizes 512 --losses GlobalKD

One process runs, round after round, one plain step of the student, one pass of the teacher's
backbone as Detectron2 builds it, and one distilled step for each loss; the table has the medians.
Machines drift within minutes: only such steps compare. The ratio is
distilled / (plain + teacher): 1 is the floor of a teacher that is run as it is. Beside other work
use --threads 1: seconds are then CPU seconds.
"""

import argparse
import json
from pathlib import Path
from statistics import median, quantiles
from typing import Callable, Dict, Iterator, List

import torch
from detectron2.modeling import build_model
from setting import (
    CONFIGS,
    PeakMemory,
    Stepper,
    autocast,
    calm,
    fill_bank,
    load_config,
    make_batch,
    propose_near_boxes,
    seconds,
)
from tabulate import tabulate

from globalkd.distiller import Distiller
from globalkd.experiments.provenance import processor
from globalkd.losses import DISTILL_LOSS_REGISTRY
from globalkd.losses.building import build_loss
from globalkd.teacher.building import teacher_config

FULL = "GlobalKD"  # the three terms of the configuration's default
DETECTORS = {"rcnn": "Faster R-CNN", "retinanet": "RetinaNet"}


class Case:
    """One pair of detectors: a plain step, a teacher's pass, distilled steps of any loss.

    Student and teacher are shared: a distiller is put into the student for its step and taken out
    again. Without one, the student is the stock detector.
    """

    def __init__(self, pair: str, detector: str, *, device: str, precision: str, opts=()):
        self.cfg = load_config(pair, detector, device, opts)
        self.device, self.precision = device, precision
        torch.manual_seed(0)
        self.settings = Distiller.from_config(self.cfg)
        self.teacher = self.settings["teacher"]
        teacher = self.cfg.MODEL.GLOBALKD.TEACHER
        stock_cfg = teacher_config(teacher.CONFIG_FILE, teacher.OPTS)
        stock_cfg.MODEL.DEVICE = device
        self.stock = build_model(stock_cfg).eval().requires_grad_(False)
        plain_cfg = self.cfg.clone()
        plain_cfg.MODEL.GLOBALKD.ENABLED = False
        self.student = build_model(plain_cfg).train()
        for model in (self.student, self.teacher.model, self.stock):
            calm(model)
        if detector == "rcnn":
            self.student.proposal_generator.register_forward_hook(propose_near_boxes)
        self.num_classes = getattr(self.student, "roi_heads", self.student).num_classes
        self.plain = Stepper(self.student, device, precision)

    def distilled(self, losses: List[str]) -> Callable:
        """A training step with these losses; ValueError where they are not for this detector."""
        settings = {**self.settings, "losses": [build_loss(self.cfg, name) for name in losses]}
        distiller = Distiller(**settings)
        distiller.attach(self.student)
        distiller.start(self.student)
        if distiller.bank is not None:
            fill_bank(distiller.bank)
        self.student.distiller = distiller
        step = Stepper(self.student, self.device, self.precision)
        self.student.distiller = None

        def run(batch):
            self.student.distiller = distiller
            try:
                return step(batch)
            finally:
                self.student.distiller = None

        return run

    @torch.no_grad()
    def teacher_pass(self, batch) -> None:
        with autocast(self.device, self.precision):
            self.stock.backbone(self.stock.preprocess_image(batch).tensor)


def measure(case: Case, batch: List[dict], losses: Dict[str, List[str]], rounds: int):
    """Name -> seconds of each round; name -> memory peak, of one more step before them."""
    calls = {"plain": case.plain, "teacher": case.teacher_pass}
    for name, members in losses.items():
        try:
            calls[name] = case.distilled(members)
        except ValueError:  # the loss is not defined for this detector
            continue
    times, peaks = {name: [] for name in calls}, {}
    for name, call in calls.items():
        call(batch)  # a graph is recorded at the second call: its memory counts
        case.student.zero_grad(set_to_none=True)
        with PeakMemory(case.device) as peaks[name]:
            call(batch)
    for round_ in range(rounds):
        for name, call in calls.items():
            torch.manual_seed(round_)  # all sample the same proposals
            times[name].append(seconds(lambda call=call: call(batch), case.device))
    return times, peaks


def rows_of(args, losses) -> Iterator[dict]:
    on_gpu = args.device == "cuda"
    for pair in args.pairs:
        for detector in args.detectors:
            for precision in args.precisions:
                case = Case(pair, detector, device=args.device, precision=precision, opts=args.opts)
                for size in args.sizes:
                    batch = make_batch(args.images, size, case.num_classes)
                    times, peaks = measure(case, batch, losses, args.rounds)
                    plain, teacher = times.pop("plain"), times.pop("teacher")
                    for loss, distilled in times.items():
                        yield {
                            "detector": detector,
                            "teacher": pair.split("-")[0],
                            "student": pair.split("-")[1],
                            "device": args.device,
                            "precision": precision,
                            "images": args.images,
                            "size": size,
                            "loss": loss,
                            "plain_s": median(plain),
                            "teacher_s": median(teacher),
                            "distilled_s": median(distilled),
                            **_ratio(plain, teacher, distilled),
                            "peak_bytes": peaks[loss].bytes,
                            "plain_peak_bytes": peaks["plain"].bytes,
                            "rounds": args.rounds,
                            "opts": args.opts,
                            "threads": torch.get_num_threads(),
                            "processor": processor(),
                            "torch": torch.__version__,
                            **({"gpu": torch.cuda.get_device_name()} if on_gpu else {}),
                        }


def _ratio(plain, teacher, distilled) -> dict:
    """Median over rounds of each round's own ratio, and the quartiles."""
    ratios = [d / (p + t) for p, t, d in zip(plain, teacher, distilled)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ratio": median(ratios), "ratio_quartiles": [low, high]}


def table(rows: List[dict]) -> str:
    """The rows for people, as Markdown; a column names the losses unless all are the recipe."""
    name_losses = any(r["loss"] != FULL for r in rows)
    lines = []
    for r in rows:
        low, high = r["ratio_quartiles"]
        line = {"pair": f"{DETECTORS[r['detector']]} {r['teacher']} → {r['student']}"}
        line |= {"on": _setting(r), "images, px": f"{r['images']} × {r['size']}"}
        line |= {"loss": r["loss"]} if name_losses else {}
        lines.append(
            {
                **line,
                **{f"{name} [s]": _seconds(r, name) for name in ("plain", "teacher", "distilled")},
                "over plain": _over_plain(r),
                "over the floor (quartiles)": f"**{r['ratio']:.3f}** ({low:.3f} to {high:.3f})",
                "memory of a step [GB]": (
                    f"{r['plain_peak_bytes'] / 1e9:.2f} → {r['peak_bytes'] / 1e9:.2f}"
                ),
            }
        )
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def loss_table(rows: List[dict]) -> str:
    """One line a loss, as Markdown: what it costs with each detector."""
    cells = {(r["loss"], r["detector"]): [_over_plain(r), f"{r['ratio']:.2f}"] for r in rows}
    detectors = list(dict.fromkeys(r["detector"] for r in rows))
    header = ["loss"]
    for detector in detectors:
        header += [f"{DETECTORS[detector]}, over plain", "over the floor"]
    lines = [
        [f"`{loss}`", *(cell for d in detectors for cell in cells.get((loss, d), ["", ""]))]
        for loss in dict.fromkeys(r["loss"] for r in rows)
    ]
    return tabulate(lines, header, "github", disable_numparse=True)


def _setting(row: dict) -> str:
    opts = row.get("opts", [])
    pairs = [f"{k.removeprefix('MODEL.GLOBALKD.')} {v}" for k, v in zip(opts[::2], opts[1::2])]
    device = {"cpu": "CPU", "cuda": "GPU"}[row["device"]]
    return ", ".join([device, row["precision"], *pairs])


def _seconds(row: dict, name: str) -> str:
    return f"{row[f'{name}_s']:.{3 if row['device'] == 'cuda' else 2}f}"


def _over_plain(row: dict) -> str:
    return f"+{row['distilled_s'] / row['plain_s'] - 1:.0%}"


def choose_losses(names: List[str], cfg) -> Dict[str, List[str]]:
    """Row name -> losses: the full recipe, or one loss of the registry; "all" is everything."""
    full = list(cfg.MODEL.GLOBALKD.LOSSES)
    registered = sorted(name for name, _ in DISTILL_LOSS_REGISTRY)
    if "all" in names:
        names = [FULL, *registered]
    return {name: full if name == FULL else [name] for name in names}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", nargs="+", default=["R101-R50"])
    parser.add_argument("--detectors", nargs="+", default=["rcnn", "retinanet"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[256], help="side in pixels")
    parser.add_argument("--images", type=int, default=2, help="images of a batch")
    parser.add_argument("--losses", nargs="+", default=["all"], help="names, GlobalKD or all")
    parser.add_argument("--precisions", nargs="+", default=["fp32"], choices=["fp32", "amp"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE ... of the configuration")
    args = parser.parse_args(argv)
    unknown = [p for p in args.pairs if (p, "rcnn") not in CONFIGS]
    if unknown:
        parser.error(f"--pairs {unknown}: known are {sorted({p for p, _ in CONFIGS})}")
    return args


def main(argv=None) -> List[dict]:
    """Measure, print the table, write the JSON; the rows."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    cfg = load_config(args.pairs[0], args.detectors[0], args.device, args.opts)
    rows = []
    for row in rows_of(args, choose_losses(args.losses, cfg)):
        rows.append(row)
        if args.json:  # after each row: a run that is cut short leaves what it has
            Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
