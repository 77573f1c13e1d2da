"""An ordered map over several processes that reads its input only a little ahead."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import Any

ITEMS_PER_TASK = 32

_function: Callable[[Any], Any] | None = None


def map_in_processes(function: Callable[[Any], Any], items: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """Yield function(item) in order; in this process where `num_workers` is 1.

    An exception of `function` is raised here. Unlike `Pool.imap`, never holds more than a few tasks of items, and
    ends with an error where a worker is killed.
    """
    if num_workers == 1:
        yield from map(function, items)
        return
    items = iter(items)
    # Forked, so that the workers share the function's tokenizer and need no import of their own.
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(num_workers, mp_context=fork, initializer=_start_worker, initargs=(function,))
    pending = deque()
    try:
        while batch := list(islice(items, ITEMS_PER_TASK)):
            pending.append(pool.submit(_map_batch, batch))
            if len(pending) > 2 * num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function


def _map_batch(batch: list[Any]) -> list[Any]:
    return [_function(item) for item in batch]
