"""Timing that survives a noisy machine: interleaved rounds, medians, counts beside every figure."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Sample:
    """Measured durations of one thing, in seconds."""

    def __init__(self, values: list[float] | None = None) -> None:
        self.values = values if values is not None else []

    def take(self, call: Callable[[], object], each: int = 1) -> object:
        """Time one call; ``each`` is how many items it deals with."""
        start = time.perf_counter()
        result = call()
        self.values.append((time.perf_counter() - start) / each)
        return result

    def quantile(self, share: float) -> float:
        """By the nearest rank."""
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def p50(self) -> float:
        ordered = sorted(self.values)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    @property
    def p99(self) -> float:
        return self.quantile(0.99)

    def __len__(self) -> int:
        return len(self.values)


def interleave(rounds: int, *calls: Callable[[], object], each: int = 1) -> list[Sample]:
    """Time the calls in turn, so that the machine's moods hit all of them alike; every second round backwards."""
    samples = [Sample() for _ in calls]
    for number in range(rounds):
        order = list(zip(samples, calls, strict=True))
        for sample, call in order if number % 2 == 0 else reversed(order):
            sample.take(call, each)
    return samples


@contextmanager
def settled() -> Iterator[None]:
    """Keep the peers' hundreds of thousands of objects out of the collector's passes; new garbage still counts."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
