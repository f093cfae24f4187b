"""Times an epoch with and without the teacher's outputs on disk: ``python docs/scripts/cache.py [pictures]``.

Runs take turns, so that a slow moment of the machine hits all alike. An epoch is a step for every 8 pictures, without
validation. ``filled`` is what the first epoch costs with the cache, ``cached`` every later one.
"""

import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lit_reduce.backbones import Backbone, load_backbone
from lit_reduce.data.groups import Group
from lit_reduce.distill.initial import initial_reducer
from lit_reduce.distill.train import distill_data
from lit_reduce.distill.trainer import fit
from lit_reduce.settings.train import DataSettings, TrainSettings
from lit_reduce_pocket.data import scene_groups

ROUNDS, TURNS = 3, 4


def epoch(backbone: Backbone, groups: list[Group], cache: Path | None) -> float:
    """Seconds of one epoch, the teacher's passes included."""
    with tempfile.TemporaryDirectory() as output:
        steps = len(groups) // 8
        source = DataSettings(cache=None if cache is None else str(cache))
        settings = TrainSettings(data=source, steps=steps, guide_steps=0, val_every=steps, turns=TURNS, output=output)
        reducer = initial_reducer(settings, backbone)
        data = distill_data(settings, backbone, reducer, groups, groups[:1])
        start = time.monotonic()
        fit(settings, backbone.model, reducer, data, Path(output))
        return time.monotonic() - start


def main() -> None:
    """Prints medians and spread, and how many times faster a cached epoch is."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.WARNING)
    backbone, groups = load_backbone("pocket"), scene_groups("train", int((sys.argv[1:] or ["16"])[0]), TURNS)
    times: dict[str, list[float]] = {"no cache": [], "filled": [], "cached": []}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as cache:
            times["no cache"].append(epoch(backbone, groups, None))
            times["filled"].append(epoch(backbone, groups, Path(cache)))
            times["cached"].append(epoch(backbone, groups, Path(cache)))
    for name, values in times.items():
        print(f"{name:<9} {statistics.median(values):6.2f} s  [{min(values):.2f}, {max(values):.2f}]")
    ratios = [plain / cached for plain, cached in zip(times["no cache"], times["cached"], strict=True)]
    print(f"a cached epoch is {statistics.median(ratios):.2f} times as fast [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
