"""The processes of one run that torchrun starts: their group, their devices, what they share."""

from __future__ import annotations

import importlib
import inspect
import os
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["from_rank_0", "gather", "mean", "own_device", "process_group", "replicate"]

# For a rank that hangs. One that dies is noticed sooner: gloo sees its connection close, and
# torchrun ends the others. Ranks do the same work, so none waits long for another.
TIMEOUT = timedelta(minutes=10)

_replicas: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# ---- start and end -------------------------------------------------------------------------------


@contextmanager
def process_group(device: str = "auto") -> Iterator[int]:
    """Inside, the processes that torchrun started are one group; yields this process's rank.

    The group uses nccl where the run is on GPUs, gloo elsewhere, and ends with the block, errors
    included: replicas made inside cannot be trained after it. Without torchrun, or in a group that
    exists already, nothing is changed.

    Args:
        device: the recipe's field; auto and cuda mean a GPU of its own for every process.

    Raises:
        ValueError: for a device that several processes cannot share.
        ConnectionError: when another rank is gone.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield dist.get_rank() if dist.is_initialized() else 0
        return
    device = own_device(device)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        if torch.device(device).index != int(os.environ["LOCAL_RANK"]):
            raise ValueError(
                f"train: device={device!r} is one GPU for {world} processes; use cuda, which gives "
                "every process its own, or cpu"
            )
        torch.cuda.set_device(device)
    importlib.import_module("torch._dynamo")  # DDP imports it; inside, it would hold the group
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    rank = dist.get_rank()
    try:
        yield rank
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the group
        raise ConnectionError(
            f"rank {rank} stops because another of the {world} processes is gone, whose own "
            f"message says why; go on with --resume ({error})"
        ) from error
    finally:
        _end_process_group()


def _end_process_group() -> None:
    """End the group and its threads.

    The threads end with the last owner of the group, and DDP's reducer is one. A thread of gloo
    that still lets go of tensors while Python ends would abort the process.
    """
    for replica in _replicas:
        replica.reducer = replica.logger = replica.process_group = None
    dist.destroy_process_group()


def _is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def own_device(device: str) -> str:
    """The recipe's field `device` as this process's own: under torchrun cuda is cuda:LOCAL_RANK."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"config: device={device!r} is unknown; use auto, cpu or cuda") from None
    if device != "cuda" or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= gpus:
        raise ValueError(
            f"train: device='cuda' for process {local} of this machine, but torch sees {gpus} "
            f"GPUs; start {gpus or 'no'} processes here, or use cpu"
        )
    return f"cuda:{local}"


def replicate(network: nn.Module) -> nn.Module:
    """The network with gradients averaged over the ranks; BatchNorm statistics stay each rank's."""
    # torch 2.13 renames the option, and warns at the old name
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    replica = DistributedDataParallel(network, **{option: False})
    _replicas.add(replica)
    return replica


# ---- what ranks share: every rank calls these ----------------------------------------------------


def gather(value: Any) -> list[Any] | None:
    """What every rank holds, by rank, on rank 0; None on the others. Tensors are on the CPU."""
    if _world() == 1:
        return [value]
    held: list[Any] | None = [None] * _world() if dist.get_rank() == 0 else None
    dist.gather_object(value, held)
    return held


def mean(values: Tensor) -> Tensor:
    """The average of a tensor over the ranks, the same bits on each."""
    if _world() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / _world()


def from_rank_0(number: float, device: torch.device) -> float:
    """Rank 0's number on every rank, so that what is decided by it is decided alike."""
    if _world() == 1:
        return number
    held = torch.tensor(number, dtype=torch.float64, device=device)
    dist.broadcast(held, 0)
    return float(held)
