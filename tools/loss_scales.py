#!/usr/bin/env python
"""How strongly each distillation loss pulls at a student, as a Markdown table.

    tools/loss_scales.py --config-file configs/quick/gkd_R34_R18.yaml
    tools/loss_scales.py --config-file configs/gkd_R101_R50.yaml --all

On batches of the training data, with the student that MODEL.WEIGHTS names and the losses' own
parameters as they start. "Value" and "Gradient" of a loss, at its weights: its value and the norm
of its gradient with respect to the student's backbone (FPN included; the documentation's "pull"),
both as a share of those of the detection losses. "Weight" is a term's own times
MODEL.GLOBALKD.WEIGHT. Of each term, at weight 1: its value as it is, and the share of its gradient.
Nothing is trained. Warm-up, decay and later starts of the configuration are left out.
"""

import argparse
import logging
from statistics import mean

from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from globalkd import DISTILL_LOSS_REGISTRY, register_datasets
from globalkd.checks.terms import measure_terms
from globalkd.config_reading import fall_back_to_cpu, load_config
from globalkd.engine.command_line import (
    add_import_argument,
    import_modules,
    positive,
    user_errors,
)
from globalkd.engine.trainer import DistillTrainer
from globalkd.meta_arch import require_distilled
from globalkd.pairing import UnfitLosses
from globalkd.safe_loading import SafeCheckpointer

logger = logging.getLogger("globalkd")


def load(config_file, opts, *, every_loss):
    """The configuration, with every loss for a detector of its kind if asked for."""
    cfg = load_config(config_file, opts)
    node = cfg.MODEL.GLOBALKD
    if every_loss:
        stages = "one" if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE else "two"
        losses = dict(DISTILL_LOSS_REGISTRY)
        node.LOSSES = [n for n, x in losses.items() if x.stages in ("any", stages)]
    fall_back_to_cpu(cfg)
    return cfg


def measure(model, batch):
    """One batch: (loss, term or "", weight or "") -> value and gradient, as the table has them."""
    step = measure_terms(model, batch)
    result = {}
    for name, loss in model.distiller.losses.items():
        result[name, "", ""] = step.share(loss.weights)
        for term in loss.weights:
            weight = loss.weights[term] * model.distiller.schedule.weight
            _, pull = step.share([term])
            result[name, term, weight] = (step.values[term] / weight, pull / weight)
    result["all together", "", ""] = step.share(step.values)
    return result


def table(measures):
    """Markdown: means over batches; below each loss its terms."""
    lines = [
        "| Loss, term | Weight | Value | Gradient | at weight 1: value | gradient |",
        "|---|---|---|---|---|---|",
    ]
    for loss, term, weight in measures[0]:
        value, share = (mean(x) for x in zip(*(m[loss, term, weight] for m in measures)))
        if term:
            lines.append(f"| `{term}` | {weight:g} | | | {value:.3g} | {share:.3g} |")
        else:
            lines.append(f"| **{loss}** | | {value:.3g} | {share:.3g} | | |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="configuration of a distilled run")
    parser.add_argument("--all", action="store_true", help="every loss that the student can have")
    parser.add_argument("--batches", type=positive, default=5, help="batches to average over")
    add_import_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, as of train_net")
    args = parser.parse_args()
    setup_logger(name="globalkd")
    with user_errors(parser):
        print(run(args))


def build(cfg, *, every_loss):
    """The student. Of every loss, those that this pair of detectors cannot have are left out."""
    names = cfg.MODEL.GLOBALKD.LOSSES
    while True:
        try:
            return DistillTrainer.build_model(cfg)
        except UnfitLosses as error:
            if not every_loss:
                raise
            logger.warning(f"Left out: {error}")
            names[:] = [name for name in names if name not in error.losses]


def run(args):
    """The table for the arguments of the command line."""
    import_modules(args.imports)
    cfg = load(args.config_file, args.opts, every_loss=args.all)
    require_distilled(cfg)
    register_datasets(cfg)
    seed_all_rng(max(cfg.SEED, 0))
    model = build(cfg, every_loss=args.all).train()
    SafeCheckpointer(model, allow_pickle=cfg.MODEL.GLOBALKD.ALLOW_PICKLE).load(cfg.MODEL.WEIGHTS)
    model.distiller.start(model)
    batches = iter(DistillTrainer.build_train_loader(cfg))
    return table([measure(model, next(batches)) for _ in range(args.batches)])


if __name__ == "__main__":
    main()
