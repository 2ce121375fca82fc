"""Processes of one group on this machine, for tests: started as torchrun does, surely ended."""

import os
import socket
import subprocess
import sys
from pathlib import Path

LIMIT = 120  # seconds for the processes of one test, which take about 10 on an idle machine


def start(script: str, arguments: list, count: int) -> list[subprocess.Popen]:
    """`count` processes of a script in one group over gloo; their output goes to pipes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
    common |= {"OMP_NUM_THREADS": 1, "PYTHONPATH": os.pathsep.join(sys.path)}  # as imported here
    children = []
    for rank in range(count):
        own = {**common, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        command = [sys.executable, script, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        children.append(subprocess.Popen(command, env=environment, **pipes))
    return children


def finish(children: list[subprocess.Popen], limit: float = LIMIT) -> list[tuple[int, str]]:
    """(exit status, output) of every process; fails when one takes longer than the limit."""
    try:
        outputs = [child.communicate(timeout=limit)[0] for child in children]
        return [(child.returncode, text) for child, text in zip(children, outputs, strict=True)]
    finally:
        for child in children:
            child.kill()
            child.wait()


def left_threads() -> list[str]:
    """Threads of a group that outlive it: one that wakes while Python ends aborts the process."""
    names = [thread.read_text().strip() for thread in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]
