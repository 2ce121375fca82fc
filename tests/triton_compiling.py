"""What the Triton compiler makes of a kernel, for the triton_compile_*.py of each family.

These run in processes of their own: kernels that were imported under TRITON_INTERPRET=1 cannot be
compiled. They print one JSON line per kernel.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SHARED = {"90": 227 * 1024, "80": 163 * 1024, "86": 99 * 1024}  # bytes for one program


def compiled(kernel, constants, types, plain, tile, capability):
    """The compiled kernel, and its use of resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {n: v for n, v in constants.items() if n in names}
    signature = {n: f"*{types[n]}" if n in types else "i32" for n in names}
    signature |= dict.fromkeys(constants, "constexpr")
    values = {(names.index(n),): v for n, v in constants.items()}
    divisible = [n for n in names if signature[n][0] == "*" or (n in plain and n not in constants)]
    hints = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    source = ASTSource(kernel, signature, values, hints)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        command = [tools / "cuobjdump", "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
    return result, report.stdout


def print_reports(cases, target):
    """A line per kernel: bytes of stack (spilled registers), registers, shared memory (bytes), and
    how many loads, stores, tensor-core products and asynchronous copies its PTX has.

    Args:
        cases: function of the compute capability that yields (name, what `compiled` takes).
        target: such as sm_90.
    """
    capability = int(target.removeprefix("sm_"))
    wide = r"\.global[^;\n]*\.v4\.b32"
    counted = {
        "loads": r"\bld\.global",
        "wide_loads": r"\bld" + wide,
        "stores": r"\bst\.global",
        "wide_stores": r"\bst" + wide,
        "products": r"mma\.sync|wgmma\.mma_async",
        "wgmma": r"wgmma\.mma_async",
        "copies": r"cp\.async\.c[ag]",
        "wide_copies": r"cp\.async\.cg\.shared\.global[^;]*, 0x10",
    }
    for name, case in cases(capability):
        result, report = compiled(*case, capability)
        row = {
            "name": name,
            "stack": int(re.search(r"STACK:(\d+)", report)[1]),
            "registers": int(re.search(r"REG:(\d+)", report)[1]),
            "shared": result.metadata.shared,
        }
        row |= {what: len(re.findall(found, result.asm["ptx"])) for what, found in counted.items()}
        print(json.dumps(row), flush=True)


# ---- in the test's own process -------------------------------------------------------------------


def processes(script, tmp_path_factory):
    """A process of the script per target, side by side; for a fixture to yield from."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    started = {}
    for target in ("sm_80", "sm_90"):
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, Path(__file__).parent / script, target]
        started[target] = subprocess.Popen(command, env=dict(environment), **pipes)
    yield started
    for process in started.values():
        process.kill()
        process.wait()


def reports(process):
    """{name: report} of every kernel that a process has compiled."""
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return {row["name"]: row for row in map(json.loads, output.splitlines())}
