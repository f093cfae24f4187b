"""Two processes train together: ``python pair.py FOLDER PORT``; forked after the imports, which cost the most."""

import importlib
import os
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
root = importlib.import_module("tests.conftest")
local = importlib.import_module("tests.distill.conftest")
training = importlib.import_module("lit_reduce.distill.trainer")
groups_of = importlib.import_module("tests.distill.test_parallel").four_groups

folder, port = Path(sys.argv[1]), sys.argv[2]
child = os.fork()
rank = 1 if child == 0 else 0
os.environ |= {
    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "pair",
}  # fmt: skip
tiny = root.wrap(root.build_model(), root.build_processor())
chosen = local.make_settings(folder, devices=2, pictures=1)
reducer = local.make_reducer()
teacher = local.Teacher(tiny, [2, 3])
trainer, average = training.fit(chosen, tiny.model, reducer, local.make_data(teacher, groups_of(), chosen), folder)
torch.save({"weights": reducer.state_dict(), "average": average.average}, folder / f"rank{rank}.pt")
sys.stdout.flush()
if child == 0:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
