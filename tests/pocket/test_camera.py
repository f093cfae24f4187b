"""The camera: repeatable, of the same size, and mild enough that colours and edges stay."""

import numpy as np
from PIL import Image

from lit_reduce.pocket.camera import photograph


def test_faults_repeat_and_stay_mild() -> None:
    clean = np.full((120, 120, 3), (200, 30, 40), np.uint8)
    clean[40:80, 40:80] = (20, 90, 220)
    changed = 0
    for seed in range(40):
        first, again = (photograph(Image.fromarray(clean), np.random.default_rng(seed)) for _ in range(2))
        assert first.tobytes() == again.tobytes()
        assert (first.size, first.mode) == ((120, 120), "RGB")
        taken = np.asarray(first, float)
        assert np.abs(taken[50:70, 50:70].mean((0, 1)) - clean[60, 60]).max() < 40
        assert np.abs(taken[:30].mean((0, 1)) - clean[0, 0]).max() < 40
        changed += bool((taken != clean).any())
    assert 20 < changed < 40  # most pictures have a fault, some have none
