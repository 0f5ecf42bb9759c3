"""Shared by tests, benchmarks and CLI: the tolerance rule, timers, memory and peak meters."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import backends
from .flops import multiply_adds as multiply_adds
from .fold import BlockWeights
from .reference import inverted_residual_reference
from .spec import BlockSpec
from .workloads import MOBILENET_V2_STAGES as MOBILENET_V2_STAGES
from .workloads import mobilenet_v2_blocks as mobilenet_v2_blocks

_Name = TypeVar("_Name", bound=Hashable)


def random_weights(
    spec: BlockSpec, *, expand_bias: float = 1.0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> BlockWeights:
    """Folded weights that keep activations near unit scale; ``expand_bias`` scales the expansion's bias."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, fan_in: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (values / fan_in**0.5).to(dtype)

    e, c_in, c_out = spec.hidden_channels, spec.in_channels, spec.out_channels
    products = (
        normal(e, c_in, 1, 1, fan_in=c_in) if spec.expand else None,
        normal(e, fan_in=1) * expand_bias if spec.expand else None,
        normal(e, 1, spec.kernel, spec.kernel, fan_in=spec.kernel),
        normal(e, fan_in=1),
        normal(c_out, e, 1, 1, fan_in=e),
        normal(c_out, fan_in=1),
    )
    if not spec.squeeze_channels:
        return BlockWeights(*products)
    s = spec.squeeze_channels
    # The gate's product spreads over all of a sigmoid.
    squeeze = normal(s, e, 1, 1, fan_in=e), normal(s, fan_in=1), normal(e, s, 1, 1, fan_in=s) * 3, normal(e, fan_in=1)
    return BlockWeights(*products, *squeeze)


def perturb_batch_norm(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every batch norm statistics and an affine that matter, in place; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm: Any
        for norm in model.modules():
            if getattr(norm, "running_mean", None) is None:
                continue
            norm.running_mean.normal_(0, 0.2, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
            if norm.weight is not None:
                norm.weight.uniform_(0.7, 1.3, generator=generator)
                norm.bias.normal_(0, 0.3, generator=generator)
    return model


def fit_batch_norm(model: nn.Module, batch: Tensor) -> nn.Module:
    """Sets every batch norm's statistics to what it sees in one pass over ``batch``, in place; returns the model.

    A deep network with random weights and made-up statistics forgets its input; with fitted ones it does not, so
    that comparing two of them compares something.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]
    before = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over what it sees
        norm.train()
    with torch.no_grad():
        model(batch)
    for norm, (training, momentum) in zip(norms, before, strict=True):
        norm.train(training)
        norm.momentum = momentum
    return model


@dataclass(frozen=True)
class Agreement:
    """``|fused - ref64|`` against twice the error of eager in the same dtype, plus ``atol``."""

    error: float  # largest |fused - ref64|
    eager_error: float  # largest |eager_same_dtype - ref64|
    limit: float  # 2 * eager_error + atol
    finite: bool  # whether fused has a NaN or infinity only where the reference has one

    @property
    def ok(self) -> bool:
        return self.finite and self.error <= self.limit

    def __str__(self) -> str:
        verdict = "within" if self.ok else "OUTSIDE"
        return f"error {self.error:.2e} {verdict} {self.limit:.2e} (eager's own {self.eager_error:.2e})"


def agreement(fused: Tensor, eager: Tensor, reference: Tensor) -> Agreement:
    """The tolerance rule of this project, on one result.

    ``reference`` is computed in float64, ``eager`` by torch's own ops in ``fused``'s dtype. ``atol`` is four units
    in the last place of the reference's largest value: what one rounding more than eager's can cost; for a float64
    result, whose reference is no better than it and leaves eager no error, sixteen.
    """
    if not fused.shape == eager.shape == reference.shape:
        raise ValueError(f"shapes differ: {fused.shape}, {eager.shape}, {reference.shape}")
    regular = reference.isfinite() & eager.isfinite()
    finite = bool((fused.isfinite() | ~regular).all()) and bool((~fused.isfinite() | regular).all())
    if not regular.any():
        return Agreement(0.0, 0.0, 0.0, finite)
    ref = reference[regular].double()
    units = 16 if fused.dtype == torch.float64 else 4
    atol = units * torch.finfo(fused.dtype).eps * max(1.0, ref.abs().max().item())
    error = (fused[regular].double() - ref).abs().nan_to_num(nan=float("inf")).max().item()
    eager_error = (eager[regular].double() - ref).abs().max().item()
    return Agreement(error, eager_error, 2 * eager_error + atol, finite)


def block_agreement(fused: Tensor, x: Tensor, weights: BlockWeights, spec: BlockSpec) -> Agreement:
    """:func:`agreement` of one block's result with the reference on the same input and float64 weights."""
    eager = inverted_residual_reference(x, weights, **spec.geometry)
    return agreement(fused, eager, inverted_residual_reference(x.double(), weights, **spec.geometry))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch.set_num_threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_instruction_sets() -> list[str]:
    """Instruction sets the CPU kernel is built for and this processor has, best first."""
    return [] if backends._C is None else [name for name, here in backends._C.instruction_sets() if here]


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Forces the CPU kernel's instruction set for a while. Raises RuntimeError when it cannot run here."""
    before = backends._C.instruction_set()
    backends._C.set_instruction_set(name)
    try:
        yield
    finally:
        backends._C.set_instruction_set(before)


@dataclass
class Timing:
    """Seconds per call of one candidate, one value a round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, over the median."""
        if len(self.seconds) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def interleave(
    candidates: Mapping[_Name, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 2,
    calls: Mapping[_Name, int] | None = None,
    threads: Mapping[_Name, int] | None = None,
    settle: float = 0.0,
    on_round: Callable[[], None] = lambda: None,
) -> dict[_Name, Timing]:
    """Times candidates in turn, round by round, so that a noisy machine is equally unfair to all of them.

    ``calls`` runs a quick candidate several times per measurement. ``threads`` gives a candidate its own number of
    torch's threads; it then runs once more, not timed, for the pool that the change starts. ``settle`` waits so many
    seconds before each candidate, for threads of the one before that spin on, and runs it once more, too. Compare
    medians, or better the ratios of one round (:func:`ratio`).
    """
    timings = {name: Timing() for name in candidates}
    threads_before = torch.get_num_threads()
    for candidate in candidates.values():
        for _ in range(warmup):
            candidate()
    for _ in range(rounds):
        for name, candidate in candidates.items():
            count = (calls or {}).get(name, 1)
            if threads is not None:
                torch.set_num_threads(threads[name])
            if settle:
                time.sleep(settle)
            if settle or threads is not None:
                candidate()
            start = time.perf_counter()
            for _ in range(count):
                candidate()
            timings[name].seconds.append((time.perf_counter() - start) / count)
        on_round()
    torch.set_num_threads(threads_before)
    return timings


def ratio(of: Timing, over: Timing) -> float:
    """The median over rounds of ``of / over``: above 1, ``over`` is faster."""
    return statistics.median(a / b for a, b in zip(of.seconds, over.seconds, strict=True))


def peak_activation_bytes(call: Callable[[], object]) -> int:
    """The most CPU bytes that torch's allocator held at once during ``call``, over what it held before.

    Counted from the profiler's allocation events: results, temporaries and kernels' scratch; not parameters that
    exist before, nor what libraries allocate behind torch's back.
    """
    # Lazily created buffers and packed weights are not activations; of some networks the first call is only looked at.
    for _ in range(3):
        call()
    # Kineto reports on stderr that it found no GPU driver, which nobody asked.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    profile: Any
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = call()
    del result
    live = peak = 0
    for event in sorted(
        (e for e in profile.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


_PEAK_ROUNDS = 300_000  # about a millisecond


def multiply_adds_at_peak(dtype: torch.dtype = torch.float32) -> int:
    """Runs the instruction set's multiply-add loop on each of torch's threads; returns the operations done.

    Time it beside a kernel (:func:`interleave`): a shared machine's clock wanders, their ratio does not.
    """
    return backends._C.multiply_add(_PEAK_ROUNDS, str(dtype).removeprefix("torch."))


def of_peak(operations: float, timing: Timing, peak: Timing, dtype: torch.dtype = torch.float32) -> float:
    """``operations`` per call, over what :func:`multiply_adds_at_peak` did in the same time: median over rounds.

    Call it with the number of threads that ``peak`` was timed with.
    """
    per_call = multiply_adds_at_peak(dtype)
    return statistics.median(
        operations / seconds / (per_call / at_peak)
        for seconds, at_peak in zip(timing.seconds, peak.seconds, strict=True)
    )
