"""Top-k over processes: the bits of the single process, for every way to place the weights.

Real processes talk over gloo. Each is this file as a script with the environment that torchrun
would set. Starting them costs most of the time, so four start once and do all cases in turn: all
four together, and groups of two and three of them, whose ranks differ from the global ones.
"""

import itertools
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sparse_cocktail import global_selection, ops
from sparse_cocktail.distributed import process_group
from sparse_cocktail.selection import global_topk

WORLD = 4
GROUPS = {"2 ranks": [1, 3], "3 ranks": [1, 2, 3], "4 ranks": None}
LIMIT = 90  # seconds for all processes, which take about 10 on an idle machine
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# ---- the cases -----------------------------------------------------------------------------------

# The last weight is channels_last; rows of very different sizes, so ranges end inside weights.
SHAPES = ((1, 1), (7, 33), (5, 3, 8), (0, 5), (1, 700), (24, 40, 3, 3))
# Which weights each of the 2, 3 or 4 ranks holds when they are sharded; some hold none.
SHARDS = {
    2: [[0, 1], [2, 3, 4, 5]],
    3: [[], [0, 1, 2, 3, 5], [4]],
    4: [[1], [], [5, 0, 4], [2, 3]],
}


def _picked(pool, shape, generator):
    return pool[torch.randint(len(pool), shape, generator=generator)]


def _special(dtype):
    """Both zeros, limits, infinities, NaN with different payloads, denormals."""
    limits = torch.finfo(dtype)
    step = limits.smallest_normal * limits.eps
    numbers = [0.0, -0.0, 1.0, limits.max, limits.min, step, -2 * step, limits.tiny]
    values = torch.tensor([*numbers, math.inf, -math.inf, math.nan, -math.nan], dtype=dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return torch.cat([values, (values[-2:].view(integer) | 3).view(dtype)])


VALUES = {
    "normal": lambda d, s, g: torch.randn(s, generator=g).to(d),
    "all_equal": lambda d, s, g: torch.full(s, -1.5, dtype=d),
    "two_values": lambda d, s, g: _picked(torch.tensor([0.5, -2.0], dtype=d), s, g),
    "special": lambda d, s, g: _picked(_special(d), s, g),
    "zeros": lambda d, s, g: _picked(torch.tensor([0.0, -0.0], dtype=d), s, g),
    # all digits but the last are the same: the threshold is decided in the last round
    "one_bin": lambda d, s, g: 1 + torch.rand(s, generator=g, dtype=torch.float64).to(d) / 512,
    "denormals": lambda d, s, g: (
        torch.randint(-9, 10, s, generator=g).to(d) * torch.finfo(d).smallest_normal / 16
    ),
}


def drawn(values, dtype, seed):
    """The whole sequence of weights, the same on every rank, and bits of about 0.4 of them."""
    generator = torch.Generator().manual_seed(seed)
    weights = [VALUES[values](dtype, shape, generator) for shape in SHAPES]
    weights[-1] = weights[-1].to(memory_format=torch.channels_last)
    within = [ops.pack_mask(torch.rand(s, generator=generator) < 0.4) for s in SHAPES]
    return weights, within


def counts(total):
    return [0, 1, total // 10 + 1, total // 2, total - 1, total]


def case_names():
    few = ("two_values", "zeros", "denormals")
    dtypes = {values: DTYPES[:2] if values in few else DTYPES for values in VALUES}
    plain = [f"{values} {str(dtype)[6:]}" for values in VALUES for dtype in dtypes[values]]
    return [*plain, "small_chunks", "parameters", "nothing"]


def wrong(name, seed, rank, world, group):
    """What differs from the single process; no rank stops before the others."""
    if name == "nothing":
        found = [global_topk([], 0, group), global_topk([], 0, group, "shard")]
        found += global_topk([torch.ones(0, 5), torch.ones(3, 0)], 0, group)
        shapes = [list(bits.shape) if torch.is_tensor(bits) else bits for bits in found]
        return [] if shapes == [[], [], [0, 1, 1], [3, 1, 0]] else shapes
    values, _, dtype = (name if " " in name else "normal float32").partition(" ")
    weights, within = drawn(values, getattr(torch, dtype), seed)
    if name == "parameters":
        weights = [torch.nn.Parameter(w) for w in weights]
    # small chunks: many pieces per weight, and a row that is cut too
    global_selection.CHUNK = {"cpu": 64} if name == "small_chunks" else CHUNK
    # Every call is several exchanges: each count is called one way in each of the three groups,
    # each time another one of the four. So values and group meet all four ways and all counts, and
    # a count of these values meets both placements, with bits and without.
    ways = list(itertools.product((replicated, sharded), (None, within)))
    found = []
    for number, keep in enumerate(counts(sum(w.numel() for w in weights))):
        placement, eligible = ways[(number + seed + world) % 4]
        got, expected = placement(weights, keep, eligible, rank, world, group)
        same = len(got) == len(expected) and all(map(torch.equal, got, expected))
        if not same or any(bits.requires_grad for bits in got):
            found.append(f"keep={keep} within={eligible is not None} {placement.__name__}")
    return found


CHUNK = global_selection.CHUNK


def replicated(weights, keep, within, rank, world, group):
    with ops.backend("reference"):
        expected = ops.topk_masks(weights, keep, within)
    return global_topk(weights, keep, group, "replicate", within), expected


def sharded(weights, keep, within, rank, world, group):
    """The sequence is the weights of rank 0, then those of rank 1, ..."""
    order = [i for part in SHARDS[world] for i in part]
    own = SHARDS[world][rank]
    eligible = [None if within is None else [within[i] for i in part] for part in (order, own)]
    with ops.backend("reference"):
        all_bits = ops.topk_masks([weights[i] for i in order], keep, eligible[0])
    # a rank without weights may leave out its bits, too
    got = global_topk([weights[i] for i in own], keep, group, "shard", eligible[1] or None)
    return got, [all_bits[order.index(i)] for i in own]


def _one(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


def _bits(weight):
    return ops.pack_mask(torch.ones_like(weight, dtype=torch.bool))


# Faults: the arguments of rank `own` of a group, and what every rank must raise.
FAULTS = {
    "placement": (
        lambda own: ([_one(2, 3)], 1, "shards"),
        ValueError,
        "placement='shards' is unknown; use 'replicate'",
    ),
    "placements differ": (
        lambda own: ([_one(2, 3)], 1, "shard" if own else "replicate"),
        ValueError,
        "placement differs between the ranks: one has replicate, another shard",
    ),
    "keep above the total": (
        lambda own: ([_one(2, 3)] * own, 100, "shard"),
        ValueError,
        "keep=100 is not in [0, {sharded}], the number of elements over all ranks",
    ),
    "keep above the replicas": (
        lambda own: ([_one(2, 3)], 7, "replicate"),
        ValueError,
        "keep=7 is not in [0, 6], the number of elements over all ranks",
    ),
    "negative keep": (
        lambda own: ([_one(2, 3)], -1, "shard"),
        ValueError,
        "keep=-1 is not in [0, ",
    ),
    "keep is a list": (
        lambda own: ([_one(2, 3)], [1], "shard"),
        TypeError,
        "keep=[1] is not an integer; give a count",
    ),
    "keeps differ": (
        lambda own: ([_one(2, 3)], 1 + own, "shard"),
        ValueError,
        "keep differs between the ranks: one has 1, another 2",
    ),
    "dtypes differ": (
        lambda own: ([_one(2, 3, dtype=torch.float16 if own else torch.float32)], 1, "shard"),
        ValueError,
        "dtype differs between the ranks: one has torch.float32, another torch.float16; convert",
    ),
    "shapes differ": (
        lambda own: ([_one(2 + own, 3)], 1, "replicate"),
        ValueError,
        "shapes differs between the ranks: one has [(2, 3)], another [(3, 3)]; use placement='sh",
    ),
    "within on one rank": (
        lambda own: ([_one(2, 3)], 1, "shard", None if own else [_bits(_one(2, 3))]),
        ValueError,
        "within differs between the ranks: one has given, another None",
    ),
    "a vector on rank 1": (
        lambda own: ([_one(3) if own == 1 else _one(2, 3)], 1, "shard"),
        ValueError,
        "weights[0] has shape (3,), but a weight has at least the 2 dimensions (out, in); leave "
        "vectors such as biases out (on rank 1)",
    ),
    "integers on rank 1": (
        lambda own: ([_one(2, 3).to(torch.int64 if own == 1 else torch.float32)], 1, "shard"),
        TypeError,
        "weights[0] has dtype torch.int64, which is not one of",
    ),
    "no list on rank 1": (lambda own: (None if own == 1 else [], 0), TypeError, "(on rank 1)"),
    "bits of another shape on rank 1": (
        lambda own: ([_one(2, 3)], 1, "shard", [_bits(_one(2, 33 if own == 1 else 3))]),
        ValueError,
        "within[0] has shape (2, 1, 2), but this weight has mask bits",
    ),
    "bits elsewhere on rank 1": (
        lambda own: (
            [_one(2, 3)],
            1,
            "shard",
            [_bits(_one(2, 3)).to("meta" if own == 1 else "cpu")],
        ),
        ValueError,
        "within[0] is on meta, but its weight is on cpu; move it",
    ),
}


def fault(name, own, group):
    """(type, message) of what a rank of the group raises, or what it returned instead."""
    weights, keep, *rest = FAULTS[name][0](own)
    try:
        return ["returned", repr(global_topk(weights, keep, group, *rest))]
    except Exception as error:
        return [type(error).__name__, str(error)]


def not_a_member(group):
    try:
        global_topk([_one(2, 3)], 1, group)
    except ValueError as error:
        return str(error)


# ---- a process -----------------------------------------------------------------------------------


def work(folder: Path, rank: int) -> None:
    """Do all cases in all groups of this rank; leave what happened as JSON."""
    left = {}
    for label, members in GROUPS.items():
        group = None if members is None else dist.new_group(members)
        if members is not None and rank not in members:
            left[f"{label}: outside"] = not_a_member(group)
            continue
        own, world = dist.get_rank(group), dist.get_world_size(group)
        for seed, name in enumerate(case_names()):
            left[f"{label}: {name}"] = wrong(name, seed, own, world, group)
        for name in FAULTS:
            left[f"{label}: {name}"] = fault(name, own, group)
    (folder / f"rank-{rank}.json").write_text(json.dumps(left))


@pytest.fixture(scope="module")
def left(tmp_path_factory) -> list[dict]:
    """What the processes leave, by rank."""
    folder = tmp_path_factory.mktemp("global_topk")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(WORLD):
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": WORLD, "RANK": rank}
        own |= {"LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        command = [sys.executable, __file__, str(folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        children.append(subprocess.Popen(command, env=environment, **pipes))
    try:
        outputs = [child.communicate(timeout=LIMIT)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert not any(child.returncode for child in children), "\n".join(outputs)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(WORLD)]


# ---- the tests -----------------------------------------------------------------------------------

each_group = pytest.mark.parametrize("label", GROUPS)


@each_group
@pytest.mark.parametrize("name", case_names())
def test_bits_are_those_of_one_process(left, label, name):
    said = [left[rank][f"{label}: {name}"] for rank in GROUPS[label] or range(WORLD)]
    assert said == [[]] * int(label[0]), said


@each_group
@pytest.mark.parametrize("name", FAULTS)
def test_every_rank_raises_the_same(left, label, name):
    _, kind, message = FAULTS[name]
    ranks = GROUPS[label] or range(WORLD)
    first, *others = (left[rank][f"{label}: {name}"] for rank in ranks)
    sharded = 6 * sum(range(len(ranks)))  # rank r holds r weights of 6 elements
    assert first[0] == kind.__name__ and message.format(sharded=sharded) in first[1], first
    assert others == [first] * len(others)


def test_a_rank_outside_the_group_is_told(left):
    message = left[0]["2 ranks: outside"]
    assert message.startswith("global_topk: group does not contain rank 0 that calls it")


@pytest.mark.parametrize("placement", ["replicate", "shard"])
@pytest.mark.parametrize("values", VALUES)
def test_without_processes_it_is_topk_masks(placement, values):
    weights, within = drawn(values, torch.float32, 0)
    for eligible in (None, within):
        expected = ops.topk_masks(weights, 777, eligible)
        got = global_topk(iter(weights), 777, None, placement, eligible)
        assert all(map(torch.equal, got, expected))
    with pytest.raises(
        ValueError, match=r"^global_topk: keep=10\*\*9|^global_topk: keep=1000000000"
    ):
        global_topk(weights, 10**9, placement=placement)
    with pytest.raises(ValueError, match="global_topk: placement='both' is unknown"):
        global_topk(weights, 1, placement="both")


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranges_cover_the_sequence_once_in_order_and_evenly(world):
    shapes = [*SHAPES, (100, 50), (3, 0), (2, 5, 0, 3), (2, 2)]
    cuts = global_selection._cuts(shapes, world)
    assert len(cuts) == world
    sizes = []
    for i, shape in enumerate(shapes):
        edges = [part[i] for part in cuts]
        if math.prod(shape):
            rows = [row for start, end in edges for row in range(start, end)]
            assert rows == list(range(shape[0])), f"{shape}: {edges}"
        sizes.append([(end - start) * math.prod(shape[1:]) for start, end in edges])
    loads = [sum(of_rank) for of_rank in zip(*sizes, strict=True)]
    largest_row = max(math.prod(shape[1:]) for shape in shapes)
    assert all(abs(load - sum(loads) / world) <= largest_row for load in loads), loads


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_keys_order_like_those_of_the_reference(dtype):
    from sparse_cocktail import reference

    values = torch.cat([_special(dtype), torch.randn(200).to(dtype)])
    keys, expected = global_selection._keys(values).long(), reference.key(values).long()
    assert torch.equal(keys[:, None] < keys, expected[:, None] < expected)


def test_chunks_are_every_eligible_value_once(monkeypatch):
    monkeypatch.setattr(global_selection, "CHUNK", {"cpu": 100})
    for shape in [*SHAPES, (3, 70, 200), (2, 5000)]:
        weight = torch.randperm(math.prod(shape)).float().view(shape)
        mask = torch.rand(shape) < 0.5
        for bits, all_of in ((None, weight.flatten()), (ops.pack_mask(mask), weight[mask])):
            pieces = list(global_selection._chunks(weight, bits))
            values = torch.cat([*pieces, torch.empty(0)])
            assert torch.equal(values.sort()[0], all_of.sort()[0])
            widest = 32 * max(1, math.prod(shape[2:]))  # words of bits are not cut
            assert max((len(piece) for piece in pieces), default=0) <= max(100, widest)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group("cpu") as own_rank:
        work(Path(sys.argv[1]), own_rank)
