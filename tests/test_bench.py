"""The benchmark kit: gates that refuse wrong masks, files of the right form, one short run."""

import re
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import bench_masks
import gates
import gpu
import groups_masks
import output
import peers_masks
import pytest
import shapes
import timing
import torch
from commands import assert_refused, short_bench

from sparse_cocktail import ops, reference

CPU = torch.device("cpu")
SHORT = timing.Plan(seconds=0.0, few=2, many=2, most=2, rounds=2, fast=10.0)
FIELDS = {
    "op": str,
    "case": str,
    "impl": str,
    "mode": str,
    "median_us": (float, type(None)),
    "p10_us": (float, type(None)),
    "p90_us": (float, type(None)),
    "samples_us": list,
    "bytes": int,
    "flops": int,
    "error": (int, float, type(None)),
    "error_bound": (int, float, type(None)),
    "ok": bool,
}


@pytest.fixture(scope="module")
def inputs():
    return shapes.Inputs(shapes.CASES["small"], CPU, 0, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run of the command, and everything it wrote."""
    return short_bench(tmp_path_factory, "masks", "--cases", "1e4,1e5")


# ---- weights -------------------------------------------------------------------------------------


def test_cases_have_the_published_sizes():
    sizes = {name: case.numel for name, case in shapes.CASES.items()}
    assert sizes["resnet50"] == 25_502_912  # 25,557,032 parameters less BatchNorm and bias
    assert sizes["vit-b16"] == 86_292_480
    assert all(sizes[name] == int(float(name)) for name in groups_masks.GROWTH)


def test_weights_are_views_of_one_tensor_in_their_layout(inputs):
    for weights in inputs.sets:
        storage = weights.flat.untyped_storage().data_ptr()
        assert all(w.untyped_storage().data_ptr() == storage for w in weights.tensors)
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights.tensors[:3])
        assert all(w.data_ptr() % 64 == weights.flat.data_ptr() % 64 for w in weights.tensors)
    assert not inputs.sets[0].flat.equal(inputs.sets[1].flat)


def test_sets_are_taken_in_turn(inputs):
    turns = [inputs.next() for _ in range(2 * len(inputs.sets))]
    assert set(turns) == set(range(len(inputs.sets)))
    assert all(a != b for a, b in zip(turns, turns[1:], strict=False))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_broken_ties(layout):
    weight = torch.randint(1, 4, (8, 16, 3, 3)).float().contiguous(memory_format=layout)
    before = weight.clone()
    shapes.break_ties([weight])
    groups = reference.weight_view(weight).abs().unflatten(-1, (-1, 8)).sort(-1).values
    assert (groups[..., 1:] > groups[..., :-1]).all()
    assert torch.allclose(weight, before, rtol=1e-4)


# ---- gates ---------------------------------------------------------------------------------------


def tied_weights():
    """Few magnitudes, so that ties decide; a linear and a convolution weight, `in` no word."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, float("nan")])
    return [
        values[torch.randint(6, (12, 40))],
        values[torch.randint(6, (8, 24, 3, 3))].contiguous(memory_format=torch.channels_last),
    ]


@pytest.mark.parametrize("portion", [50, 2**24])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 137, 900, 2208])
def test_the_exact_check_accepts_the_reference(monkeypatch, portion, nested, keep):
    monkeypatch.setattr(shapes, "CHUNK", portion)
    weights = tied_weights()
    within = reference.topk_masks(tied_weights(), [1200]) if nested else None
    bits = reference.topk_masks(weights, [keep], within)
    assert gates.exact_topk(weights, bits, keep, within) == gates.Verdict(0)


def flipped(bits, keep_on):
    """Bits with one more or one less element, or one kept element moved to a pruned place."""
    mask = reference.unpack_mask(bits[0], (12, 40))
    on, off = mask.nonzero()[-1], (~mask).nonzero()[0]
    mask[tuple(on)] = keep_on != "less" and keep_on != "moved"
    mask[tuple(off)] = keep_on != "less"
    return [reference.pack_mask(mask), *bits[1:]]


@pytest.mark.parametrize("portion", [50, 2**24])
@pytest.mark.parametrize("how", ["more", "less", "moved"])
def test_the_exact_check_refuses_a_wrong_mask(monkeypatch, portion, how):
    monkeypatch.setattr(shapes, "CHUNK", portion)
    weights = [torch.randn(12, 40), torch.randn(8, 24, 3, 3)]
    bits = flipped(reference.topk_masks(weights, [800]), how)
    assert not gates.exact_topk(weights, bits, 800).ok
    assert not gates.equals(reference.topk_masks(weights, [800]))(bits).ok


@pytest.mark.parametrize("portion", [50, 2**24])
def test_the_exact_check_refuses_ties_in_another_order(monkeypatch, portion):
    monkeypatch.setattr(shapes, "CHUNK", portion)
    weights = [torch.ones(12, 40), torch.ones(8, 24, 3, 3)]
    right = reference.topk_masks(weights, [100])
    assert gates.exact_topk(weights, right, 100).ok
    assert not gates.exact_topk(weights, flipped(right, "moved"), 100).ok


def test_the_exact_check_refuses_what_is_not_eligible():
    weights = [torch.randn(12, 40), torch.randn(8, 24, 3, 3)]
    within = reference.topk_masks([-1 / w for w in weights], [900])  # the smallest ones
    assert not gates.exact_topk(weights, reference.topk_masks(weights, [300]), 300, within).ok


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (2, 8)])
def test_the_exact_check_of_groups(n, m):
    weights = tied_weights()
    right = [reference.nm_mask(w, n, m) for w in weights]
    assert gates.exact_nm(weights, right, n, m).ok
    assert not gates.exact_nm(weights, flipped(right, "moved"), n, m).ok
    swapped = [reference.nm_mask(w.flip(1), n, m) for w in weights]
    assert not gates.exact_nm(weights, swapped, n, m).ok


def test_the_exact_check_of_unified_masks():
    weights = [torch.randn(12, 40), torch.randn(8, 24, 3, 3), torch.randn(6, 3, 3, 3)]
    within = reference.topk_masks([torch.randn_like(w) for w in weights], [1500])
    arguments = (500, (2, 4), [6, 4, 3], 0.8)
    lists = reference.unified_masks(weights, *arguments, within, None)
    flat = [bits for masks in lists for bits in masks]
    assert gates.exact_unified(weights, flat, *arguments, within).ok
    for place in range(9):
        wrong = [b.clone() for b in flat]
        wrong[place][-1, -1, -1] ^= 1
        assert not gates.exact_unified(weights, wrong, *arguments, within).ok, place


def test_a_proven_result_is_what_others_must_equal():
    weights = [torch.randn(12, 40), torch.randn(8, 24, 3, 3)]
    right, checks = reference.topk_masks(weights, [800]), []
    gate = gates.proven(lambda out: checks.append(1) or gates.exact_topk(weights, out, 800))
    assert not gate(flipped(right, "moved")).ok
    assert gate(right).ok and gate([b.clone() for b in right]).ok
    assert not gate(flipped(right, "moved")).ok
    assert len(checks) == 2


def test_values_that_differ_are_refused():
    want = [torch.randn(4, 6)]
    assert gates.same_values(want)([want[0].clone()]).ok
    assert not gates.same_values(want)([want[0] + 1e-6]).ok
    assert not gates.same_values(want)([want[0] * float("nan")]).ok
    assert not gates.same_values(want)([want[0].double()]).ok


# ---- measuring -----------------------------------------------------------------------------------


def group(*impls):
    gate = gates.same_values([torch.ones(3, 4)])
    return timing.Group("ones", "", list(impls), gate, bytes=48)


def right(name="ours/right", **how):
    return timing.Impl(name, lambda _: lambda: torch.ones(3, 4), lambda out: [out], **how)


def test_wrong_and_broken_implementations_are_not_timed(inputs):
    def explode():
        raise RuntimeError("no such kernel in /home/somebody/kernels/x.py\nmore")

    wrong = timing.Impl("torch/wrong", lambda _: lambda: torch.zeros(3, 4), lambda out: [out])
    broken = timing.Impl("torch/broken", lambda _: explode)
    rows = timing.measure(group(right(), wrong, broken), inputs, SHORT)
    good, bad, gone = rows
    assert good["ok"] and good["error"] == 0 and len(good["samples_us"]) == 2
    assert good["p10_us"] <= good["median_us"] <= good["p90_us"]
    for row in (bad, gone):
        assert (row["ok"], row["median_us"], row["samples_us"]) == (False, None, [])
    assert bad["error"] == 1.0 and "differ" in bad["note"]
    assert gone["error"] is None and gone["note"] == "RuntimeError: no such kernel in x.py"


def test_one_of_ours_that_turns_wrong_is_found(inputs):
    calls = []

    def call():
        calls.append(1)
        return torch.full((3, 4), 1.0 if len(calls) < 3 else 2.0)

    moving = timing.Impl("ours/moving", lambda _: call, lambda out: [out])
    (row,) = timing.measure(group(moving), inputs, SHORT)
    assert not row["ok"] and row["median_us"] is None


def test_a_failed_capture_is_a_row(inputs):
    class NoCapture(timing.CpuRunner):
        modes = ("graph", "eager")

        def ready(self, call, mode, inputs):
            if mode == "graph":
                raise RuntimeError("operation not permitted when stream is capturing")
            return call

    rows = timing.measure(group(right(), right("torch/x", graph=False)), inputs, SHORT, NoCapture())
    states = [(r["impl"], r["mode"], r["ok"]) for r in rows]
    expected = [("ours/right", "graph", False), ("ours/right", "eager", True)]
    assert states == [*expected, ("torch/x", "eager", True)]
    assert "capturing" in rows[0]["note"]


def test_the_order_of_calls_on_a_gpu(monkeypatch, inputs):
    """A stand-in for torch.cuda: flush, wait and record in order; the stream after a failure."""
    log, stream = [], ["main"]

    def named(name, result=None):
        return lambda *_, **__: log.append(name) or result

    @contextmanager
    def graph(_, pool):
        stream[0] = "side"  # which stays current when the capture fails, as in torch
        yield
        stream[0] = "main"

    event = SimpleNamespace(record=named("record"), elapsed_time=lambda _: 0.25)
    side = SimpleNamespace(wait_stream=lambda _: None)
    fake = {
        "Event": lambda **_: event,
        "Stream": lambda: side,
        "CUDAGraph": lambda: SimpleNamespace(replay=named("replay")),
        "graph": graph,
        "stream": lambda _: nullcontext(),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda _: None, name=stream[0]),
        "set_stream": lambda before: stream.__setitem__(0, before.name),
        "synchronize": named("wait"),
        "get_device_properties": lambda: SimpleNamespace(L2_cache_size=2**20),
        "graph_pool_handle": lambda: (0, 5),
        "current_device": lambda: 0,
    }
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        call = lambda *given, name=name: log.append((name, *given))  # noqa: E731
        monkeypatch.setattr(torch._C, name, call, raising=False)
    empty, flush = torch.empty, SimpleNamespace(sum=named("flush"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *s, **k: flush if "device" in k else empty(*s, **k))
        run = timing.CudaRunner()
    replay = run.ready(lambda: 1, "graph", inputs)
    log.clear()
    assert run.clock(replay, "graph") == run.clock(named("call"), "eager") == 250.0
    graphed = ["flush", "record", "replay", "record", "wait"]
    assert log == [*graphed, "flush", "wait", "record", "call", "record", "wait"]

    def refuse():
        if stream[0] == "side":
            raise RuntimeError("operation not permitted when stream is capturing")

    log.clear()
    with pytest.raises(RuntimeError, match="capturing"):
        run.ready(refuse, "graph", inputs)
    assert stream == ["main"]
    ended = [entry for entry in log if entry != "wait"]
    assert ended == [("_cuda_endAllocateToPool", 0, (0, 5)), ("_cuda_releasePool", 0, (0, 5))]


def test_implementations_take_turns_on_changing_weights(inputs):
    seen = []

    def bind_as(name):
        def bind(weights):
            place = next(i for i, w in enumerate(inputs.sets) if w is weights)
            return lambda: seen.append((name, place)) or torch.ones(3, 4)

        return bind

    impls = [timing.Impl(f"torch/{n}", bind_as(n), lambda out: [out]) for n in "ab"]
    timing.measure(group(*impls), inputs, SHORT)
    timed = seen[-4:]
    assert [name for name, _ in timed] == ["a", "b", "b", "a"]
    assert all(x[1] != y[1] for x, y in zip(timed, timed[1:], strict=False))


def test_values_that_change_under_one_address():
    """As on a GPU: one set of weights, other values for each sample, masks that follow them."""
    fixed = shapes.Inputs(shapes.CASES["small"], CPU, 0, 0, fixed=True)

    class Replays(timing.CpuRunner):
        modes = ("graph", "eager")

        def ready(self, call, mode, inputs):
            if mode == "graph":
                inputs.next()
                call()
            return call

    plain, nested = (make for op, make in groups_masks.makers("small") if op == "unified_masks")
    for make in (plain, nested):
        fixed.first()
        rows = timing.measure(make(fixed.sets[0]), fixed, SHORT, Replays())
        assert [row for row in rows if not row["ok"]] == []
        assert {row["mode"] for row in rows} == {"graph", "eager"}


def test_sample_counts():
    plan = timing.Plan()
    assert plan.samples(2.0) == 5 and plan.samples(2.0, few=3) == 3
    assert plan.samples(0.09) == 20 and plan.samples(1e-6) == 60


# ---- ours and peers ------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(groups_masks.makers("small"))))
def test_ours_and_every_peer_give_the_reference_masks(inputs, index):
    op, make = groups_masks.makers("small")[index]
    made = make(inputs.sets[0])
    assert made.op == op
    names = [impl.name for impl in made.impls]
    assert len(set(names)) == len(names) and any(n.startswith(("torch/", "numpy/")) for n in names)
    for impl in made.impls:
        if impl.name in timing.LIMITS:
            continue
        bound = impl.bind(inputs.sets[0])
        bound = bound if isinstance(bound, timing.Bound) else timing.Bound(bound)
        for _ in range(2):  # what is called again must give the same
            verdict = made.gate(impl.result(bound.run()))
            assert verdict.ok, f"{impl.name}: {verdict.says}"


def test_unified_masks_within_depend_on_the_earlier_mask(inputs):
    plain, nested = (make for op, make in groups_masks.makers("small") if op == "unified_masks")
    result = plain(inputs.sets[0]).impls[0]
    out = result.result(result.bind(inputs.sets[0])())
    assert not nested(inputs.sets[0]).gate(out).ok


def test_prune_takes_fresh_weights_each_time(inputs):
    peers = peers_masks.topk_peers(inputs.sets[0], 1000)
    (prune,) = [p for p in peers if "global_unstructured" in p.name]
    bound = prune.bind(inputs.sets[0])
    bits = [gates.as_bits(m) for m in prune.result(bound.run())]
    inputs.sets[0].flat.neg_().mul_(2)
    assert gates.equals(bits)(prune.result(bound.run())).ok
    inputs.sets[0].flat.neg_().div_(2)


# ---- files ---------------------------------------------------------------------------------------


def test_the_json_has_the_documented_form(finished):
    _, result, _ = finished
    assert result["format"] == 1
    facts = result["environment"]
    assert {"cpu", "cores", "threads", "torch", "python", "triton", "revision"} <= set(facts)
    for row in result["rows"]:
        for name, kind in FIELDS.items():
            assert isinstance(row[name], kind), (name, row[name])
        assert row["ok"] == (row["median_us"] is not None) == bool(row["samples_us"])
    impls = {row["impl"] for row in result["rows"]}
    assert {"torch/sum", "torch/copy", "torch/topk", "torch/three steps, tuned"} <= impls
    if ops.extension_path is not None:
        assert any(name.startswith("ours/cpp") for name in impls)


def test_nothing_in_the_files_names_the_machine(finished):
    import platform

    folder, _, _ = finished
    for name in ("cpu.json", "cpu.md"):
        text = (folder / name).read_text()
        assert not re.search(r"/(home|tmp|root|work|usr)/", text)
        assert not platform.node() or platform.node() not in text


def test_tables_and_pictures_are_written(finished):
    folder, result, said = finished
    for name in ("cpu.png", "cpu-growth.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    text = (folder / "cpu.md").read_text()
    for op, case in output.groups(result["rows"]):
        assert f"## {op}: {case}" in text
        assert case in said
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    bench_masks.redraw(folder / "cpu.json")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_derived_columns():
    def row(impl, median, moved, ok=True):
        case = {"op": "x", "case": "c", "mode": "eager", "note": "", "bytes": moved}
        time = {"median_us": median, "p10_us": median, "p90_us": median, "samples_us": [median]}
        return {**case, **time, "impl": impl, "ok": ok}

    rows = [
        row("ours/cpp", 200.0, 4_000_000),
        row("torch/slow", 5000.0, 4_000_000),
        row("torch/wrong", None, 4_000_000, ok=False),
        row("torch/sum", 100.0, 4_000_000),
        row("torch/copy", 160.0, 8_000_000),
    ]
    head, line = output.overview(rows)
    cells = dict(zip(head, line, strict=True))
    assert cells["read passes"] == "2.00" and cells["of copy"] == "40 %"
    assert line[-2:] == ["torch/slow (eager)", "25.0x"]
    text = output.markdown({"rows": rows, "environment": {}}, "t")
    assert "| torch/wrong | eager | not timed |" in text


# ---- command, make -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["masks", "--cases", "resnet51"], "case='resnet51' is unknown"),
        (["masks", "--ops", "sort"], "op='sort' is unknown"),
        (["masks", "--device", "tpu"], "device='tpu' is not one of cpu, cuda"),
        (["masks", "--redraw", "none.json"], "none.json"),
    ],
)
def test_errors_are_one_line(arguments, message):
    assert_refused(message, "bench", *arguments)


def test_without_a_checkout(monkeypatch, tmp_path):
    from sparse_cocktail.cli import bench

    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a/b/c/bench.py"))
    assert_refused("error: bench needs a checkout", "bench", "masks")


def test_the_steps_of_make_gpu(tmp_path, capsys):
    done = gpu.run("one", [sys.executable, "-c", "print('all well')"], 20, tmp_path / "log")
    assert (done.code, done.says, done.state) == (0, "all well", "ok")
    assert (tmp_path / "log").read_text() == "all well\n"
    failed = gpu.run("two", [sys.executable, "-c", "raise SystemExit(3)"], 20)
    late = gpu.run("three", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert (failed.state, late.state) == ("FAILED", "timed out")
    assert "three" in gpu.collect([done, failed, late]).splitlines()[-1]
    missing = gpu.run("four", ["no-such-tool"], 20)
    assert (missing.code, missing.says) == (127, "no-such-tool is not installed here")
    commands = gpu.proof_commands(tmp_path)
    assert set(commands) == set(gpu.LIMITS["proof"]) - {"build", "tests"}
    assert all("tests/test_gpu_nm.py" in commands[tool] for tool in ("memcheck", "racecheck"))
    assert "tests/test_masks.py" in gpu.tests("smoke") and "tests/test_bank.py" in gpu.tests("full")
    command = gpu.pytest_command("full")  # what compilers make of kernels needs no card
    assert "not compiler" in command and not [test for test in command if "on_host" in test]
    capsys.readouterr()
