"""Fair timing of several implementations of one thing, on the CPU or a GPU.

    group = Group("topk_masks", "keep 20 %", implementations, gate, bytes=floor)
    rows = measure(group, inputs, Plan())

All implementations are timed in turn, round by round, in alternating order, each sample on other
weights than the one before. One is timed only when its result passes the gate; ours are checked
again afterwards. On a GPU the L2 cache is overwritten before each sample, and each implementation
is timed twice: `eager` from an idle device, so that what the host does counts, and `graph`, the
replay of a captured CUDA graph. What cannot be captured, runs out of memory or is wrong becomes a
row with `ok: false`, the reason and no time.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from gates import Verdict  # isort: skip - neighbours, not packages
from shapes import Inputs, Weights  # isort: skip

__all__ = ["Bound", "Group", "Impl", "Plan", "broken", "measure", "runner", "spread"]

REFERENCE, READ_PASS, COPY = "reference", "torch/sum", "torch/copy"
LIMITS = (READ_PASS, COPY)


@dataclass
class Bound:
    """An implementation bound to one set of weights; `reset` is called before `call`, untimed."""

    call: Callable[[], Any]
    reset: Callable[[], None] | None = None

    def run(self) -> Any:
        if self.reset is not None:
            self.reset()
        return self.call()


@dataclass
class Impl:
    """One implementation.

    Args:
        name: `ours/...`, `reference`, or a peer such as `torch/topk`.
        bind: makes everything that is not timed for one set of weights, returns what is.
        result: the list of tensors that the gate compares, from what `call` returned.
        graph: whether a CUDA graph of it is tried; it is not where the host must wait.
    """

    name: str
    bind: Callable[[Weights], Bound | Callable[[], Any]]
    result: Callable[[Any], list] = list
    graph: bool = True
    note: str = ""
    few: int = 0  # samples where it is slow, when these are other than the plan's

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours/")


@dataclass
class Group:
    """Implementations that compute one thing.

    Args:
        op: name of the op, `setting`: its arguments in words.
        gate: verdict on the result for the first set of weights; None for limits of the machine.
        bytes: fewest bytes that must move; flops: fewest operations.
    """

    op: str
    setting: str
    impls: list[Impl]
    gate: Callable[[list], Verdict]
    bytes: float
    flops: float = 0.0
    weights: int = 0


@dataclass(frozen=True)
class Plan:
    """How many samples: a time per implementation, at least `few`, and `many` where it is fast."""

    seconds: float = 1.0
    few: int = 5
    many: int = 20
    most: int = 60
    fast: float = 0.1  # seconds below which an implementation gets `many`
    rounds: int = 5

    def samples(self, seconds: float, few: int = 0) -> int:
        least = self.many if seconds < self.fast else few or self.few
        return max(least, min(self.most, int(self.seconds / max(seconds, 1e-9))))


# ---- devices -------------------------------------------------------------------------------------


class CpuRunner:
    """Wall clock around a call."""

    modes = ("eager",)

    def ready(self, call: Callable[[], Any], mode: str, inputs: Inputs) -> Callable[[], Any]:
        return call

    def clock(self, call: Callable[[], Any], mode: str) -> float:
        start = time.perf_counter_ns()
        out = call()
        end = time.perf_counter_ns()
        del out
        return (end - start) / 1e3

    def wait(self) -> None:
        pass


class CudaRunner:
    """CUDA events around a call or a graph replay, after the L2 cache was overwritten."""

    modes = ("graph", "eager")
    warm_up = 3

    def __init__(self) -> None:
        # eight times the L2: the write also hides the launch of a graph behind it
        size = max(2**28, 8 * torch.cuda.get_device_properties().L2_cache_size)
        self.flush = torch.empty(size // 4, dtype=torch.int32, device="cuda")
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def ready(self, call: Callable[[], Any], mode: str, inputs: Inputs) -> Callable[[], Any]:
        """Warm up, compile, and capture for mode "graph"."""
        if mode == "eager":
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.warm_up):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        inputs.next()  # captured over other values than the gate will see
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=pool):
                out = call()
        except Exception:  # a failed capture leaves its own stream current
            torch.cuda.set_stream(before)
            _abandon(pool)
            raise

        def replay():
            graph.replay()
            return out

        return replay

    def clock(self, call: Callable[[], Any], mode: str) -> float:
        self.flush.sum()  # by reading: dirty lines would be written back in the timed region
        if mode == "eager":
            torch.cuda.synchronize()
        self.start.record()
        out = call()
        self.end.record()
        torch.cuda.synchronize()
        del out
        return self.start.elapsed_time(self.end) * 1e3

    def wait(self) -> None:
        torch.cuda.synchronize()


def _abandon(pool: tuple[int, int]) -> None:
    """Tell the allocator that a failed capture is over. Before torch 2.12 nobody does
    (pytorch/pytorch#180395), and from then on no memory would be given back."""
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it knows already
        return
    torch._C._cuda_releasePool(device, pool)


def runner(device: torch.device) -> CpuRunner | CudaRunner:
    return CudaRunner() if device.type == "cuda" else CpuRunner()


# ---- measuring -----------------------------------------------------------------------------------


@dataclass
class _Entry:
    impl: Impl
    mode: str
    bound: dict[int, Bound] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    wanted: int = 0
    verdict: Verdict | None = None
    failure: str = ""


def _bind(entry: _Entry, place: int, inputs: Inputs, run) -> Bound:
    if place not in entry.bound:
        bound = entry.impl.bind(inputs.sets[place])
        bound = bound if isinstance(bound, Bound) else Bound(bound)
        if bound.reset is not None:
            bound.reset()
        bound.call = run.ready(bound.call, entry.mode, inputs)
        entry.bound[place] = bound
    return entry.bound[place]


def _sample(entry: _Entry, place: int, inputs: Inputs, run) -> float:
    bound = _bind(entry, place, inputs, run)
    if bound.reset is not None:
        bound.reset()
    return run.clock(bound.call, entry.mode)


def _check(entry: _Entry, group: Group, inputs: Inputs, run) -> bool:
    """Run on the first set of weights and ask the gate."""
    bound = _bind(entry, inputs.first(), inputs, run)
    inputs.first()  # a capture has moved on to other values
    out = bound.run()
    run.wait()
    if entry.impl.name in LIMITS:
        return True
    entry.verdict = group.gate(entry.impl.result(out))
    if not entry.verdict.ok:
        entry.failure = entry.verdict.says or f"wrong by {entry.verdict.error:g}"
    return entry.verdict.ok


def _prepare(entry: _Entry, group: Group, inputs: Inputs, run, plan: Plan) -> None:
    """Gate, then a sample that tells how many there is time for."""
    if not _check(entry, group, inputs, run):
        return
    place = inputs.next()
    seconds = _sample(entry, place, inputs, run) / 1e6
    if seconds < 10 * plan.fast:  # the first sample may have touched buffers for the first time
        seconds = _sample(entry, place, inputs, run) / 1e6
    entry.wanted = plan.samples(seconds, entry.impl.few)
    if seconds < plan.fast:  # bound and touched beforehand: no buffer is new in a timed sample
        for place in range(len(inputs.sets)):
            _bind(entry, place, inputs, run).run()
        run.wait()


def _guarded(entry: _Entry, action: Callable, *args) -> None:
    """Failures of one implementation are its result, not the end of the run."""
    try:
        action(entry, *args)
    except Exception as error:  # noqa: BLE001 - a peer may raise anything
        entry.failure = _one_line(error)
        entry.bound.clear()
        _free()


def _one_line(error: Exception) -> str:
    """The first line, without folders: results name no machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = re.sub(r"(?:/[\w.+-]+)+/", "", lines[0])
    return f"{type(error).__name__}: {text}"[:240]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # after a capture that failed, the cache may refuse: it is no result
            return


def measure(group: Group, inputs: Inputs, plan: Plan, run=None) -> list[dict[str, Any]]:
    """Rows of the benchmark JSON, one per implementation and mode."""
    run = run or runner(inputs.device)
    entries = [
        _Entry(impl, mode)
        for impl in group.impls
        for mode in run.modes
        if mode == "eager" or impl.graph
    ]
    for entry in entries:
        _guarded(entry, _prepare, group, inputs, run, plan)
    for turn in range(plan.rounds):
        running = [entry for entry in entries if not entry.failure]
        for entry in running if turn % 2 == 0 else running[::-1]:
            share = entry.wanted * (turn + 1) // plan.rounds - entry.wanted * turn // plan.rounds
            _guarded(entry, _repeat, share, inputs, run)
    for entry in entries:
        if entry.impl.ours and not entry.failure:
            _guarded(entry, _check, group, inputs, run)
    rows = [_row(entry, group, inputs) for entry in entries]
    for entry in entries:
        entry.bound.clear()
    _free()
    return rows


def _repeat(entry: _Entry, count: int, inputs: Inputs, run) -> None:
    for _ in range(count):
        entry.samples.append(_sample(entry, inputs.next(), inputs, run))


def spread(samples: list[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    if len(samples) == 1:
        return (samples[0],) * 3
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return statistics.median(samples), tenths[0], tenths[-1]


def _row(entry: _Entry, group: Group, inputs: Inputs) -> dict[str, Any]:
    ok, verdict = not entry.failure, entry.verdict
    median, low, high = spread(entry.samples) if ok else (None,) * 3
    error = verdict.error if verdict and verdict.error < float("inf") else None
    moved = group.bytes
    if entry.impl.name in LIMITS:
        moved = inputs.case.bytes * (2 if entry.impl.name == COPY else 1)
    return {
        "op": group.op,
        "case": f"{inputs.case.name}, {group.setting}" if group.setting else inputs.case.name,
        "impl": entry.impl.name,
        "mode": entry.mode,
        "median_us": _short(median),
        "p10_us": _short(low),
        "p90_us": _short(high),
        "samples_us": [_short(s) for s in entry.samples] if ok else [],
        "bytes": round(moved),
        "flops": round(group.flops),
        "error": error,
        "error_bound": verdict.bound if verdict else None,
        "ok": ok,
        "weights": group.weights or inputs.case.numel,
        "note": "; ".join(text for text in (entry.failure, entry.impl.note) if text),
    }


def broken(op: str, case: str, error: Exception) -> dict[str, Any]:
    """The row of a group that could not even be set up."""
    empty = dict.fromkeys(("median_us", "p10_us", "p90_us", "error", "error_bound"))
    row = {"op": op, "case": case, "impl": "ours/set-up", "mode": "eager", **empty}
    rest = {"samples_us": [], "bytes": 0, "flops": 0, "ok": False, "weights": 0}
    return {**row, **rest, "note": _one_line(error)}


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
