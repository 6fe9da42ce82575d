"""Starting and ending the processes of a training.

Around Detectron2's `launch`: a stop signal reaches every process, the exit code says how the
training ended, and the loss of a process is told as such.
"""

import logging
import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Callable, Iterator, List

import torch
import torch.distributed as dist
from detectron2.engine import launch as launch_processes
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

#: Asking a training to save and end: the first is sent by clusters, the second by Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: How gloo, and in the second line NCCL, say that another process is gone, or does not answer.
_CONNECTION_LOST = (
    *("connection closed by peer", "connection reset by peer", "timed out waiting"),
    *("remote process exit", "communicator was aborted"),
)


def launch(main: Callable, args, *, timeout_minutes: float = 30) -> None:
    """Run `main(args)` in `args.num_gpus` processes on this machine, or in this one for 0 and 1.

    Args:
        main: the training.
        args: from Detectron2's argument parser.
        timeout_minutes: how long a process waits for the others at most.

    Raises:
        SystemExit: the training was asked to stop; the code is 128 + the signal's number.
    """
    timeout = timedelta(minutes=timeout_minutes)
    with _signals_forwarded(args.num_gpus * args.num_machines > 1):
        try:
            launch_processes(
                _run,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args, timeout),
                timeout=timeout,
            )
        except ProcessExitedException as ended:
            code = ended.exit_code if ended.exit_code > 0 else 128 - ended.exit_code
            if code in [128 + number for number in STOP_SIGNALS]:
                sys.exit(code)
            raise


@contextmanager
def held_messages() -> Iterator[List[logging.LogRecord]]:
    """Keep what this project logs meanwhile, before a run's log is there, in the yielded list."""
    project, records = logging.getLogger("globalkd"), []
    handler = logging.Handler()
    handler.emit = records.append
    before = project.propagate, project.handlers
    project.propagate, project.handlers = False, [handler]
    try:
        yield records
    finally:
        project.propagate, project.handlers = before


@contextmanager
def _signals_forwarded(forward: bool) -> Iterator[None]:
    def pass_on(number, frame):
        for process in multiprocessing.active_children():
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    before = {n: signal.signal(n, pass_on) for n in STOP_SIGNALS if forward}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(main: Callable, args, timeout: timedelta) -> None:
    if comm.get_world_size() == 1:
        main(args)
        return
    bound_gathering(timeout)
    code = 0
    try:
        main(args)
    except SystemExit as ended:
        code = ended.code
    if torch.cuda.is_available():
        sys.exit(code)
    # Threads of gloo may abort a process whose interpreter ends in the usual way.
    comm.synchronize()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def bound_gathering(timeout: timedelta) -> None:
    """Let the timeout hold for the group by which Detectron2 gathers objects beside NCCL, too.

    Refreshes, metrics and the wish to stop travel by it; Detectron2 makes it with PyTorch's
    default. Every process has to call this.
    """
    if dist.get_backend() == "nccl":
        group = dist.new_group(backend="gloo", timeout=timeout)
        comm._get_global_gloo_group = lambda: group


def is_connection_lost(error: Exception) -> bool:
    """Whether an error of a training with several processes says that another one is gone."""
    text = str(error).lower()
    return comm.get_world_size() > 1 and any(reason in text for reason in _CONNECTION_LOST)
