#!/usr/bin/env python
"""Train and evaluate teachers, plain students and distilled students.

    train_net.py --config-file configs/gkd_R101_R50.yaml --num-gpus 8
    train_net.py --config-file configs/gkd_R101_R50.yaml --eval-only MODEL.WEIGHTS model_final.pth

The flags are Detectron2's own, --import and --timeout; `KEY VALUE` pairs at the end override the
configuration. --eval-only leaves a config.yaml in OUTPUT_DIR as it is and writes config_eval.yaml.
SIGTERM and Ctrl-C save a checkpoint after the running step and end with code 143 or 130; --resume
goes on as if nothing had happened.
"""

import logging
import os

from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from globalkd import register_datasets
from globalkd.config_reading import fall_back_to_cpu, load_config
from globalkd.data.config_checks import check_data
from globalkd.engine.command_line import (
    add_import_argument,
    import_modules,
    user_errors,
    user_errors_of_a_run,
)
from globalkd.engine.disk import full_disk_told
from globalkd.engine.launching import held_messages, launch
from globalkd.engine.run_checks import require_output
from globalkd.engine.run_config import EVALUATED, NEXT, kept_config, replace_config
from globalkd.engine.trainer import DistillTrainer
from globalkd.safe_loading import SafeCheckpointer, require_weights

logger = logging.getLogger("globalkd")


def read(args):
    """The configuration, and what was said of it before a run's log is there."""
    with held_messages() as early:
        cfg = load_config(args.config_file, args.opts)
        fall_back_to_cpu(cfg)
    cfg.freeze()
    return cfg, early


def setup(cfg, args, early):
    """Prepare logging, devices and datasets."""
    with kept_config(cfg.OUTPUT_DIR, EVALUATED if args.eval_only else NEXT):
        default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="globalkd")
    for record in early:
        logger.handle(record)
    register_datasets(cfg, names=cfg.DATASETS.TEST if args.eval_only else None)


def evaluate(cfg, args):
    """Evaluate the weights of the configuration on its test datasets."""
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: --eval-only has nothing to evaluate on.")
    check_data(cfg, train=False)
    if args.resume:
        if not os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
            raise ValueError(
                f"--resume: OUTPUT_DIR ({cfg.OUTPUT_DIR}) has no checkpoint; give MODEL.WEIGHTS."
            )
    else:
        if cfg.MODEL.WEIGHTS:
            require_weights("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS)
        else:
            logger.warning("MODEL.WEIGHTS is empty: what is evaluated has random weights.")
        trained = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
        if os.path.isfile(trained) and "MODEL.WEIGHTS" not in args.opts:
            logger.warning(
                f"What is evaluated are the weights that the configuration names, "
                f"{cfg.MODEL.WEIGHTS or 'none'}. For the result of the training add MODEL.WEIGHTS "
                f"{trained}."
            )
    alone = cfg.clone()
    alone.defrost()
    alone.MODEL.GLOBALKD.ENABLED = False  # a student alone: no teacher is needed
    model = DistillTrainer.build_model(alone)
    allow_pickle = cfg.MODEL.GLOBALKD.ALLOW_PICKLE
    checkpointer = SafeCheckpointer(model, save_dir=cfg.OUTPUT_DIR, allow_pickle=allow_pickle)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    if checkpointer.unfilled:
        text = checkpointer.describe_unfilled("the detector")
        logger.warning(f"What is evaluated is partly random: MODEL.WEIGHTS {text}.")
    if checkpointer.unused_of_backbone:
        text = checkpointer.describe_unused("the detector")
        logger.warning(f"MODEL.WEIGHTS {text} What is evaluated lacks them.")
    results = DistillTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def main(args):
    import_modules(args.imports)
    cfg, early = read(args)
    with user_errors_of_a_run(cfg.OUTPUT_DIR), full_disk_told(cfg.OUTPUT_DIR):
        setup(cfg, args, early)
        if args.eval_only:
            return evaluate(cfg, args)
        trainer = DistillTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        replace_config(trainer)
    # What the first step alone finds out, such as boxes too small for prototypes, is input as well.
    before = user_errors_of_a_run(cfg.OUTPUT_DIR, lambda: trainer.iter == trainer.start_iter)
    with before, full_disk_told(cfg.OUTPUT_DIR):
        return trainer.train()


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    parser.set_defaults(dist_url="auto")  # a free port: of two runs neither has to wait
    parser.add_argument(
        "--timeout", type=float, default=30, metavar="MINUTES", help="longest wait for a process"
    )
    add_import_argument(parser)
    args = parser.parse_args()
    if not args.config_file:
        parser.error("--config-file is missing; it names a configuration, such as those in configs")
    with user_errors(parser), held_messages():  # once here, without the traceback of a process
        import_modules(args.imports)
        require_output(load_config(args.config_file, args.opts))
    launch(main, args, timeout_minutes=args.timeout)
