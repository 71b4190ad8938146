"""Times the CPU kernels of NATTEN 0.17.5, the last version that has them, on the
shapes of `roofline --filter neighborhood`.

    python -m venv env && . env/bin/activate
    pip install torch==2.5.1 "numpy<2.2" setuptools wheel cmake ninja packaging
    pip install --no-build-isolation --no-binary natten natten==0.17.5
    python natten_cpu.py [THREADS [NAME]]
"""

import statistics
import sys
import time

import torch

# It asks for a GPU when it is imported, and fails where there is none.
torch.cuda.get_device_capability = lambda *_: (0, 0)

from natten.functional import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk  # noqa: E402

threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
only = sys.argv[2] if len(sys.argv) > 2 else None
torch.set_num_threads(threads)
torch.set_grad_enabled(False)

SHAPES = [
    # name, batch, heads, extents, dim, window, dilation
    ("line-64k", 1, 4, (65536,), 64, (257,), 1),
    ("13x13", 8, 12, (56, 56), 64, (13, 13), 1),
    ("13x13-dilated", 8, 12, (56, 56), 64, (13, 13), 4),
    ("7x7", 8, 12, (56, 56), 64, (7, 7), 1),
    ("7x7x7", 1, 8, (16, 28, 28), 64, (7, 7, 7), 1),
]
OPERATORS = {1: (na1d_qk, na1d_av), 2: (na2d_qk, na2d_av), 3: (na3d_qk, na3d_av)}

for name, batch, heads, extents, dim, window, dilation in SHAPES:
    if only not in (None, name):
        continue
    scores, mix = OPERATORS[len(extents)]
    q, k, v = (torch.randn(batch, heads, *extents, dim) for _ in range(3))
    q *= dim**-0.5

    def run():
        weights = scores(q, k, kernel_size=window, dilation=dilation).softmax(-1)
        return mix(weights, v, kernel_size=window, dilation=dilation)

    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    print(f"{name:14} {statistics.median(times):9.1f} ms, {threads} threads", flush=True)
