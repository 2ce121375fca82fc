"""Where tests of Triton kernels run: on a GPU, or interpreted on the CPU; else they are skipped."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
can_run = pytest.mark.skipif(
    not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a CUDA GPU or TRITON_INTERPRET=1",
)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
