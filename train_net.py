#!/usr/bin/env python
"""Train and evaluate teachers, plain students and distilled students.

    train_net.py --config-file configs/gkd_R101_R50.yaml --num-gpus 8
    train_net.py --config-file configs/gkd_R101_R50.yaml --eval-only MODEL.WEIGHTS model_final.pth

The flags are Detectron2's own; `KEY VALUE` pairs at the end override the configuration.
"""

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from globalkd import add_globalkd_config, register_datasets
from globalkd.trainer import DistillTrainer, fall_back_to_cpu


def setup(args):
    """Read the configuration and prepare logging, devices and datasets."""
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    fall_back_to_cpu(cfg)
    if args.eval_only:
        cfg.MODEL.GLOBALKD.ENABLED = False  # a student alone: no teacher is needed
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="globalkd")
    register_datasets(cfg)
    return cfg


def evaluate(cfg, args):
    """Evaluate the weights of the configuration on its test datasets."""
    model = DistillTrainer.build_model(cfg)
    DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
        cfg.MODEL.WEIGHTS, resume=args.resume
    )
    results = DistillTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def main(args):
    cfg = setup(args)
    if args.eval_only:
        return evaluate(cfg, args)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser(epilog=__doc__).parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
