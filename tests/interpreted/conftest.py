"""Tests of GPU kernels on the CPU, in Triton's interpreter: `tests/kernels/test_on_gpu.py` runs them in a process."""

import os

# Triton asks when it is imported: elsewhere it would be too late.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
