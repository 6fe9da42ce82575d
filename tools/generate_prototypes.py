#!/usr/bin/env python
"""Make the prototypes of a configuration and save them to a file.

    tools/generate_prototypes.py --config-file configs/gkd_R101_R50.yaml --output p.safetensors

Training starts from the file if MODEL.GLOBALKD.PROTOTYPES.FILE names it. It carries a fingerprint
of teacher, student, dataset and settings, and is refused where they differ.
"""

import argparse

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger

from globalkd import add_globalkd_config, register_datasets
from globalkd.trainer import fall_back_to_cpu


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="a distilling configuration")
    parser.add_argument("--output", required=True, help="file to write (.safetensors)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    args = parser.parse_args()
    setup_logger(name="fvcore")
    setup_logger(name="detectron2")
    setup_logger(name="globalkd")
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    fall_back_to_cpu(cfg)
    register_datasets(cfg)
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    distiller = model.distiller
    if distiller.bank is None:
        raise SystemExit(f"No loss of {list(cfg.MODEL.GLOBALKD.LOSSES)} reads prototypes.")
    prototypes = distiller.refresh(model)
    distiller.bank.save(args.output, distiller.refresher.fingerprint, prototypes.counts)
    print(f"{args.output}: prototypes of {int((prototypes.counts > 0).sum())} classes.")


if __name__ == "__main__":
    main()
