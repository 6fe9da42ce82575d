"""In which order trainings run: several at a time, each as soon as what it needs is there."""

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Callable, Dict, Hashable, Sequence, Tuple, TypeVar

Task = TypeVar("Task", bound=Hashable)


class NeededTaskFailed(RuntimeError):
    """A task was not begun, since one that it needs has failed."""


def execute_in_order(
    tasks: Sequence[Task],
    needs: Callable[[Task], Sequence[Task]],
    execute: Callable[[Task, int], None],
    jobs: int = 1,
) -> Dict[Task, Exception]:
    """Execute tasks in threads, the first ones first as far as their needs allow.

    Args:
        tasks: in order of preference; each once.
        needs: of a task, those that must be done before it. What is not among `tasks` is taken to
            be done.
        execute: called with the task and the lane, 0 to `jobs` - 1, that it runs in.
        jobs: how many run at a time.

    Returns:
        The exceptions of those that failed or were not begun. The others are not stopped by them.
    """
    waiting, failures = list(tasks), {}
    running: Dict[Future, Tuple[Task, int]] = {}
    free = list(range(jobs))

    def is_ready(task: Task) -> bool:
        unfinished = [*waiting, *(other for other, _ in running.values())]
        return not any(need in unfinished for need in needs(task))

    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for task in [task for task in waiting if is_ready(task)][: len(free)]:
                waiting.remove(task)
                if any(need in failures for need in needs(task)):
                    failures[task] = NeededTaskFailed("not begun, since what it needs has failed")
                    continue
                lane = free.pop(0)
                running[pool.submit(execute, task, lane)] = task, lane
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, lane = running.pop(future)
                free.append(lane)
                if error := future.exception():
                    failures[task] = error
    return failures
