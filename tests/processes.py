"""Runs functions in processes of their own: several joined by gloo, or one that may be killed.

The processes are forked from a server that has imported everything once, so that one is there at
once. Several find each other by a file, not by a port, and leave by `os._exit` once their results
are on disk: gloo's threads may abort a process whose interpreter ends in the usual way.
"""

import multiprocessing
import os
import sys
import tempfile
import traceback
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm


def run_in_processes(worker, folder, *args, world_size=2):
    """Run `worker(rank, *args)` in `world_size` processes of one gloo group, without GPUs.

    Args:
        worker: a function of a module's top level; what it returns must be pickled by torch.save.
        folder: where the processes meet and leave their results.
        args: further arguments of the worker.

    Returns:
        the return values, by rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a worker raised; the text has its traceback.
    """
    _start_server()
    folder = tempfile.mkdtemp(prefix="processes_", dir=folder)
    arguments = (worker, folder, args, world_size)
    mp.start_processes(_joined, arguments, nprocs=world_size, start_method="forkserver")
    return [torch.load(Path(folder, f"rank{i}.pt")) for i in range(world_size)]


def run_unsupervised(worker, folder, *args, world_size=2):
    """`run_in_processes` where nobody ends the others when one process has ended.

    Returns:
        (exit code, traceback) of each process; see `run_alone`.
    """
    folder = tempfile.mkdtemp(prefix="processes_", dir=folder)
    return _run_all([(_joined, (i, worker, folder, args, world_size)) for i in range(world_size)])


def run_alone(worker, *args):
    """Run `worker(*args)` in a process that may end in any way.

    Returns:
        (exit code, traceback): the code is negative for a signal; the traceback is empty where the
        worker did not raise.
    """
    return _run_all([(worker, args)])[0]


def _run_all(calls):
    _start_server()
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(i)) for i in range(len(calls))]
        processes = [context.Process(target=_alone, args=(*c, f)) for c, f in zip(calls, files)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        texts = [file.read_text() if file.exists() else "" for file in files]
    return [(process.exitcode, text) for process, text in zip(processes, texts)]


def _start_server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["globalkd.engine.trainer"])
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # for it and all its children
        forkserver.ensure_running()


def _joined(rank, worker, folder, args, world_size):
    _prepare()
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    comm.create_local_process_group(world_size)
    torch.save(worker(rank, *args), Path(folder, f"rank{rank}.pt"))
    dist.barrier()  # nobody leaves while another still talks to it
    _leave()


def _alone(worker, args, error_file):
    _prepare()
    try:
        worker(*args)
    except Exception:
        error_file.write_text(traceback.format_exc())
        _leave(1)


def _prepare():
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for loader workers: the usual way


def _leave(code=0):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
