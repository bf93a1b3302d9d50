"""The machine's measured peak: what an engine's share is a share of."""

import os
import subprocess
import sys

import numpy as np

from trainkit.bench.studies import roofline


def test_the_peak_is_no_less_than_an_ordinary_product():
    peak = max(roofline.measure(1) for _ in range(2))
    limits = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    script = (
        "import time, numpy as np; a = np.ones((384, 384), np.float32); best = 9.0\n"
        "for _ in range(50):\n"
        "    start = time.perf_counter(); a @ a; best = min(best, time.perf_counter() - start)\n"
        "print(2 * 384**3 / best)"
    )
    command = [sys.executable, "-c", script]
    env = {**os.environ, **limits}
    ordinary = float(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
    assert ordinary < 1.1 * peak


def test_every_library_multiplies_the_same_matrices():
    products = [product for _, product in roofline._products(96, threads=1)]
    assert len(products) == 3
    expected, *others = (np.asarray(product()).squeeze() for product in products)
    for other in others:
        np.testing.assert_allclose(other, expected, rtol=1e-4)
