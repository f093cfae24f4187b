"""Makes the plug-ins that the repository ships: ``python docs/plugins.py [folder] [--seeds 0 1 2] [--names ...]``.

Each is one call of ``train.py`` with the settings below, a process with one thread; ``--jobs`` of them run at a time.
What is made goes to ``folder/NAME``, or ``folder/NAME-seed1`` and so on, with its settings and its table beside it.
What is there already, for this backbone, is left alone, and a call that was killed goes on where it was.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lit_reduce.backbones import load
from lit_reduce.files import atomic_folder
from lit_reduce.plugin import load_plugin

ROOT = Path(__file__).parents[1]
COMMON = ["data.images=1400"]
# Beside configs/train.yaml and configs/train/NAME.yaml: longer than the default, which has ten minutes.
LONGER = {
    "covipal": ["guide_steps=250", "steps=1100"],
    "packer": [],
    "atp": [],
    "falcon": ["data.images=600"],  # it reads pixels, which take room in the teacher's cache
    "mod": [],
    "voco": [],
    "flexattention": [],
    "remember": [],
}
FEW = ["yardsticks=[pool,fastervlm,cdpruner]"]  # covipal's table has them all


def command(name: str, seed: int, backbone: str, output: Path) -> list[str]:
    """The call that trains one."""
    given = [f"reducer={name}", f"seed={seed}", f"backbone={backbone}", f"output={output}"]
    given += COMMON + LONGER[name] + ([] if name == "covipal" and seed == 0 else FEW)
    return [sys.executable, str(ROOT / "train.py"), *given]


def make(name: str, seed: int, folder: Path, backbone: str, work: Path) -> str:
    """Trains one and puts it into its place; returns a line for the user."""
    target = folder / (name if seed == 0 else f"{name}-seed{seed}")
    if (target / "reducer_config.json").is_file():
        if load_plugin(target)[1].backbone.hash == load(backbone).identity.hash:
            return f"{target} is there"
        return f"{target} is of another backbone: remove it first"
    output = work / target.name
    output.mkdir(parents=True, exist_ok=True)
    with (output / "run.log").open("a") as log:
        done = subprocess.run(
            command(name, seed, backbone, output), cwd=ROOT, stdout=log, stderr=log, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if done.returncode:
        return f"{target} failed, see {output / 'run.log'}"
    with atomic_folder(target) as partial:
        shutil.copytree(output / "plugin", partial, dirs_exist_ok=True)
        shutil.copy(output / "settings.yaml", Path(partial) / "train.yaml")
        shutil.copy(output / "table.json", partial)
    return f"{target} made"


def main() -> None:
    """Makes all that are asked for and missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [folder] [options]"
    )
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "checkpoints" / "pocket", help="of the plug-ins")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of weights and questions")
    parser.add_argument("--names", nargs="+", choices=list(LONGER), default=list(LONGER), metavar="NAME",
                        help=", ".join(LONGER))  # fmt: skip
    parser.add_argument("--backbone", default="pocket", help="a name or a folder")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "plugins", help="checkpoints, logs and tables")
    parser.add_argument("--jobs", type=int, default=2, help="calls at a time, a thread each")
    asked = parser.parse_args()
    with ThreadPoolExecutor(asked.jobs) as pool:
        wanted = [(name, seed) for seed in asked.seeds for name in asked.names]
        for line in pool.map(lambda one: make(*one, asked.folder, asked.backbone, asked.work), wanted):
            print(line, flush=True)


if __name__ == "__main__":
    main()
