"""How well reliability weights (Eq. 8) tell ambiguous annotations from clean ones.

For each run, each RELIABILITY.TYPE that weighs, each level and the mean over levels: the area under
the ROC curve with which a low weight finds the ambiguous instances (0.5 is chance), and the mean
weight of both kinds. Prototypes are made anew with the checkpoint's student. Needs a dataset that
says how ambiguous its instances are, as digit scenes do. Writes reliability.csv.
"""

import argparse
from pathlib import Path
from typing import Dict, List

import numpy as np
from sklearn.metrics import roc_auc_score
from torch import nn

from ..engine.command_line import add_opts_argument
from ..prototypes.bank import RELIABILITIES
from ..prototypes.structures import PairedFeatures
from .annotations import dataset_annotations, make_prototypes, training_instances
from .runs import load_run, read_config
from .tables import as_text, write_csv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="run", help="output folders of distilled runs")
    parser.add_argument("--checkpoint", default="model_final.pth", help="file name in each folder")
    parser.add_argument("--dataset", default="", help="default: the first of DATASETS.TEST")
    parser.add_argument("--output", default="", help="folder to write; default: the first run's")
    add_opts_argument(parser)


def main(args: argparse.Namespace) -> None:
    folder = Path(args.output or args.runs[0])
    rows = []
    for run in args.runs:
        # With this type the bank prepares what each of them reads.
        opts = [*args.opts, "MODEL.GLOBALKD.RELIABILITY.TYPE", "coefficients"]
        model = load_run(run, args.checkpoint, distiller=True, opts=opts)
        dataset = args.dataset or read_config(run, opts).DATASETS.TEST[0]
        rows += [{"run": Path(run).name, **row} for row in reliability_report(model, dataset)]
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "reliability.csv", rows)  # after each: a later run may fail
    print(as_text(rows))


def reliability_report(model: nn.Module, dataset: str) -> List[dict]:
    """Measure every RELIABILITY.TYPE on a dataset's annotations.

    Args:
        model: a distilling meta-architecture, built with the type "coefficients"; its bank holds
            other prototypes afterwards.
        dataset: a registered name.

    Returns:
        One dict for each type and level, the last level being "mean": "type", "level", "auc", and
        the mean weights "clean" and "ambiguous".

    Raises:
        ValueError: the dataset has not both kinds of annotations, or the run no prototypes.
    """
    annotations = dataset_annotations(model, dataset)
    ambiguous = annotations.field("ambiguity", np.nan).astype(float) > 0
    if ambiguous.all() or not ambiguous.any():
        raise ValueError(
            f"The dataset {dataset!r} does not say which annotations are ambiguous: their field "
            '"ambiguity" must be 0 for some and above 0 for others.'
        )
    make_prototypes(model, training_instances(model)[1])
    rows = []
    for name in [kind for kind in RELIABILITIES if kind != "none"]:
        weights = level_reliability(model, annotations.features, name)
        weights["mean"] = np.mean(list(weights.values()), axis=0)
        rows += [
            {
                "type": name,
                "level": level,
                "auc": ambiguity_auc(weight, ambiguous),
                "clean": float(weight[~ambiguous].mean()),
                "ambiguous": float(weight[ambiguous].mean()),
            }
            for level, weight in weights.items()
        ]
    return rows


def level_reliability(
    model: nn.Module, features: PairedFeatures, kind: str = ""
) -> Dict[str, np.ndarray]:
    """Level -> (R,) omega of Eq. (8), with the prototypes in the model's bank; see its `kind`."""
    device = next(model.parameters()).device
    bank = model.distiller.bank
    return {
        level: bank.reliability(
            {level: features.teacher[level].to(device)},
            {level: features.student[level].to(device)},
            features.classes.to(device),
            kind,
        )
        .squeeze(0)
        .cpu()
        .numpy()
        for level in features.levels
    }


def ambiguity_auc(score: np.ndarray, ambiguous: np.ndarray) -> float:
    """Probability that an ambiguous row scores below a clean one; see `ranking_auc`.

    Args:
        score: (R,) reliability.
        ambiguous: (R,) bool.
    """
    return ranking_auc(-score, ambiguous)


def ranking_auc(score: np.ndarray, wanted: np.ndarray) -> float:
    """Probability that a wanted row scores above another; 0.5 is chance.

    Args:
        score: (R,).
        wanted: (R,) bool.

    Returns:
        Area under the ROC curve, ties counted half; NaN if one kind is absent.
    """
    if wanted.all() or not wanted.any():
        return float("nan")
    return float(roc_auc_score(wanted, score))
