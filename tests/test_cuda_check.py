"""The CUDA kernels compile, do not spill and hold the sparse instructions that they are for."""

import re
import runpy
from pathlib import Path

import cuda_check
import pytest

try:
    cuda_check.nvcc(), cuda_check.cuobjdump()
    missing = None
except cuda_check.Missing as error:
    missing = str(error)

needs_nvcc = pytest.mark.skipif(missing is not None, reason=str(missing))
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checked():
    """All kernels for the oldest target and for the one with most instructions."""
    return cuda_check.check(("80", "90a"))


@needs_nvcc
def test_no_kernel_spills_or_lacks_its_sparse_mma(checked):
    assert not checked[1], "\n".join(checked[1])


@needs_nvcc
def test_every_file_has_kernels_for_every_target(checked):
    rows = checked[0]
    files = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert {(row.file, row.target) for row in rows} == {
        (file, target) for file in files for target in ("80", "90a")
    }


@needs_nvcc
def test_packing_reads_aligned_weights_of_fp32_by_16_bytes(checked):
    kernels = [row for row in checked[0] if row.kernel.startswith("nm_pack_weight_kernel<fp32")]
    assert kernels
    for row in kernels:
        strided = row.kernel.endswith("2>")  # Source::kStrided
        assert row.loads_16 == (0 if strided else 8), row


BAD = """
__global__ void nm_gemm_dense_kernel(float* y) { y[threadIdx.x] *= 2; }
__global__ void nm_gemm_sm90_kernel(float* y) { y[threadIdx.x] *= 3; }
__global__ void nm_skinny_finish(float* y) { y[threadIdx.x] *= 4; }
__global__ void __launch_bounds__(1024, 2) spills(const float* x, float* y) {
  float sums[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) sums[i] = x[64 * threadIdx.x + i];
#pragma unroll
  for (int j = 0; j < 64; ++j) {
    float s = 0;
#pragma unroll
    for (int i = 0; i < 64; ++i) s += sums[i] * sums[(i * j + 1) % 64];
    y[64 * threadIdx.x + j] = s;
  }
}
"""


@needs_nvcc
def test_the_check_finds_spills_and_missing_instructions(tmp_path):
    (tmp_path / "bad.cu").write_text(BAD)
    found = cuda_check.compile_and_read(tmp_path / "bad.cu", "90a")
    complaints = "\n".join(complaint for row in found for complaint in row.complaints())
    assert re.search(r"bad.cu for sm_90a: spills uses \d+ bytes of local memory", complaints)
    assert "nm_gemm_dense_kernel has no HMMA.SP instruction" in complaints
    assert "nm_gemm_sm90_kernel has no HGMMA.SP instruction" in complaints
    assert len(complaints.splitlines()) == 3, "nm_skinny_finish does not multiply"
    (tmp_path / "bad.cu").write_text("__global__ void f() { undeclared(); }")
    with pytest.raises(
        cuda_check.NotCompiled, match="bad.cu does not compile for sm_90a:(.|\n)*undeclared"
    ):
        cuda_check.compile_and_read(tmp_path / "bad.cu", "90a")


def test_a_missing_nvcc_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["cuda_check.py", "--out", str(tmp_path)])
    assert cuda_check.main() == 2
    assert "nvcc is not there; install the CUDA toolkit" in capsys.readouterr().err


def test_targets_are_those_that_setup_builds():
    setup = (ROOT / "setup.py").read_text()
    archs = re.search(r'CUDA_ARCHS = "(.*)"', setup)[1].replace("+PTX", "").split()
    assert archs == list(cuda_check.TARGETS)
    define = re.search(r'TARGET = "(\w+)"', setup)[1]
    assert f"-DTORCH_TARGET_VERSION={define}" in cuda_check.FLAGS


@pytest.mark.parametrize(
    ("ours", "torchs", "expected"),
    (
        (None, None, ["sm_80", "compute_80", "sm_86", "sm_89", "sm_90a"]),
        (None, "7.5 8.0;9.0 12.0+PTX", ["sm_80", "sm_90a", "sm_120", "compute_120"]),
        ("80 90a", "8.6", ["sm_80", "sm_90a"]),
        (None, "7.0", []),
    ),
    ids=("default", "torch", "ours", "too-old"),
)
def test_setup_compiles_for_the_chosen_cards(monkeypatch, ours, torchs, expected):
    monkeypatch.setenv("SPARSE_COCKTAIL_NO_EXT", "1")
    for name, value in (("SPARSE_COCKTAIL_CUDA_ARCHS", ours), ("TORCH_CUDA_ARCH_LIST", torchs)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    flags = runpy.run_path(str(ROOT / "setup.py"))["cuda_arch_flags"]()
    assert [re.search(r",code=(\w+)$", flag)[1] for flag in flags] == expected


def test_setup_refuses_architectures_that_have_no_such_name(monkeypatch):
    monkeypatch.setenv("SPARSE_COCKTAIL_NO_EXT", "1")
    monkeypatch.setenv("SPARSE_COCKTAIL_CUDA_ARCHS", "Hopper")
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    with pytest.raises(SystemExit, match="'Hopper', which is no number like 80 or 90a"):
        runpy.run_path(str(ROOT / "setup.py"))["cuda_arch_flags"]()
