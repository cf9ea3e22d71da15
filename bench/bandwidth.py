"""Memory bandwidth as decoding could use it: bytes read per second by so many threads."""

from __future__ import annotations

import threading
import time

import numpy as np

SIZE = 256 * 2**20
"""Bytes each thread reads over and over: far beyond the caches."""


def read_bytes_per_s(threads: int, repeats: int = 5) -> float:
    """Best of `repeats`: each thread reads an array of its own (a maximum over 32-bit integers, vectorised)."""
    arrays = [np.ones(SIZE // 4, np.int32) for _ in range(threads)]

    def once() -> float:
        workers = [threading.Thread(target=array.max) for array in arrays]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - began

    return threads * SIZE / min(once() for _ in range(repeats))
