#!/usr/bin/env python
"""Make the prototypes of a configuration and save them to a file.

    tools/generate_prototypes.py --config-file configs/gkd_R101_R50.yaml --output p.safetensors

Training starts from the file if MODEL.GLOBALKD.PROTOTYPES.FILE names it. It carries a fingerprint
of teacher, student, dataset and settings, and is refused where they differ.
"""

import argparse

from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger

from globalkd import register_datasets
from globalkd.config_reading import fall_back_to_cpu, load_config
from globalkd.engine.command_line import add_import_argument, import_modules, user_errors
from globalkd.meta_arch import require_distilled
from globalkd.safe_loading import SafeCheckpointer


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="a distilling configuration")
    parser.add_argument("--output", required=True, help="file to write (.safetensors)")
    add_import_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    args = parser.parse_args()
    for name in ("fvcore", "detectron2", "globalkd"):
        setup_logger(name=name)
    with user_errors(parser):
        run(args)


def run(args):
    """Make the prototypes and write the file."""
    import_modules(args.imports)
    if not args.output.endswith(".safetensors"):
        raise ValueError(f"--output is {args.output!r}; it must end in .safetensors.")
    cfg = load_config(args.config_file, args.opts)
    require_distilled(cfg)
    fall_back_to_cpu(cfg)
    register_datasets(cfg)
    model = build_model(cfg).eval()
    distiller = model.distiller
    if distiller.bank is None:
        raise ValueError(
            f"{args.config_file}: no loss of MODEL.GLOBALKD.LOSSES = "
            f"{list(cfg.MODEL.GLOBALKD.LOSSES)} reads prototypes."
        )
    start_student(model, cfg)
    prototypes = distiller.refresh(model)
    distiller.bank.save(args.output, distiller.refresher.fingerprint, prototypes.counts)
    print(f"{args.output}: prototypes of {int((prototypes.counts > 0).sum())} classes.")


def start_student(model, cfg):
    """Load what a training starts from.

    Raises:
        ValueError: part of the backbone stays random. A training draws other random numbers, and
            its student would not be the one that the prototypes are of.
    """
    checkpointer = SafeCheckpointer(model, allow_pickle=cfg.MODEL.GLOBALKD.ALLOW_PICKLE)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    unfilled = checkpointer.unfilled if cfg.MODEL.WEIGHTS else model.state_dict()
    inherited = model.distiller.start(model)
    drawn = sorted({x for x in unfilled if x.startswith("backbone.")} - set(inherited))
    if drawn:
        raise ValueError(
            f"MODEL.WEIGHTS ({cfg.MODEL.WEIGHTS!r}) leaves {len(drawn)} entries of the student's "
            f"backbone random, such as {drawn[0]}. A training would start from other random "
            "values, and the prototypes would not be its student's. Name weights that fill the "
            "backbone and its FPN, or let the training make its prototypes."
        )


if __name__ == "__main__":
    main()
