"""What the kernels set for all of a process: before the first of them is loaded, and where the process is luqrun's own.

In anyone's process they take numba's threads and this CPU's features as they find them. One thing they do there too:
they make the OpenMP library that torch has loaded visible to numba's threads (`share_openmp`), which are then torch's
and need not be woken (50 to 300 us a call) when work passes from one to the other. What was loaded before keeps the
library it has.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numba
import torch
from llvmlite import binding

from luqrun.internals.of_numba import is_there


def share_openmp() -> list[ctypes.CDLL]:
    """Let numba's OpenMP threads be torch's; returns torch's OpenMP library, where it has brought one."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return [ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL) for library in libraries]


def keep_threads(threads: int) -> None:
    """Give torch (back) this number of threads, which is this thread's in OpenMP and which another library has set.

    Not by torch.set_num_threads where OpenMP itself can be told: that tells MKL too, which from then on starts threads
    for each matrix that it is given within a parallel loop, as attention does (50,000 times a step, 4 % of its time).
    """
    for library in share_openmp():
        library.omp_set_num_threads(threads)
    if torch.get_num_threads() != threads:  # another OpenMP than torch's own
        torch.set_num_threads(threads)


def claim() -> None:
    """Choose for all of numba in this process, unless the user has: OpenMP's threads, and all of AVX-512's width.

    On Intel's CPUs LLVM leaves half of each AVX-512 register unused, as the first ones that had them clocked down. All
    of it takes 0.6 of the time. It counts where numba has decorated nothing yet.
    """
    share_openmp()
    if numba.config.THREADING_LAYER == "default" and is_there("omp"):
        numba.config.THREADING_LAYER = "omp"
    if numba.config.CPU_FEATURES is None and numba.config.ENABLE_AVX:
        features = binding.get_host_cpu_features().flatten().split(",")
        if "+avx512f" in features:
            numba.config.CPU_FEATURES = ",".join([*features, "-prefer-256-bit"])
