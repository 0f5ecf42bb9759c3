"""A pytest plugin: ``benchmarks/bench_latency.py`` takes its way of a GPU on the CPU. Clock and graphs are made up.

``STAND_IN_WRONG=1`` in the environment: graphs give wrong results.
"""

import os
import time

import torch


class Event:
    """On a clock that runs a thousand times faster than the host's, so that it shows which one was read."""

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3 * 1e3  # milliseconds


class Graph:
    def __init__(self, call):
        self.call = call

    def __call__(self):
        y = self.call()
        return y + 1 if os.environ.get("STAND_IN_WRONG") else y


def compiled(model, x, mode):
    def call():
        with torch.inference_mode():
            return model(x)

    return call


def pytest_configure(config):
    import gpu_timing

    gpu_timing.DEVICE = "cpu"
    gpu_timing.cuda_event = Event
    gpu_timing.Graphed = Graph
    gpu_timing.compiled = compiled
    gpu_timing.runnable_backends = lambda: ["cpu"]
