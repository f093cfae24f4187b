"""Makes the plug-ins of the repository: ``python docs/scripts/plugins.py [folder] [--seeds 0] [--names ...]``.

Each is one call of ``train.py`` with the settings below, or two of which the second begins with what the first made,
in a process with one thread; ``--jobs`` of them run at a time.
What is made goes to ``folder/NAME``, or ``folder/NAME-seed1`` and so on, with its settings beside it. What is there
already, for this backbone, is left alone, and a call that was killed goes on where it was. The repository holds seed 0;
``--seeds 0 1 2`` makes all that docs/results/learned.json reports, and docs/results/seeds.json has each one's figures.

covipal and the plug-ins of pocket-hd come with the table of ``train.py``; ``--train-only`` leaves it to a later call,
say on another machine. The cards of the others get their figures from the table of all: ``lit-reduce table``, then
``python docs/scripts/plugins.py --cards docs/results/learned.json``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from lit_reduce import settings
from lit_reduce.backbones import load_backbone
from lit_reduce.distill.export import notes, write_table
from lit_reduce.distill.train import PLUGIN
from lit_reduce.files import atomic_folder
from lit_reduce.plugin import CONFIG, load_plugin, save_plugin
from lit_reduce.settings.train import TrainSettings

ROOT = Path(__file__).parents[2]
SETTINGS, BEFORE, TABLE, LOG = "train.yaml", "first.yaml", "table.json", "run.log"
# Beside the presets of the backbone: longer than the default, which has ten minutes.
HD = "data.name=pocket-hd data.turns=6 data.test_rows=300 pictures=2 val_every=80 table_batch=10 runs=0"
COMMON = {"pocket": ["data.images=1400"], "pocket-hd": HD.split()}
LONGER: dict[str, dict[str, list[str]]] = {
    "pocket": {
        "covipal": [
            "reducer.options.summary=4", "trainable=[rest]", "guide_steps=0", "steps=150", "warmup=10", "ema=0.95",
            "val_every=50",
        ],
        "packer": [],
        "atp": [],
        "falcon": ["data.images=600"],  # it reads pixels, which take room in the cache
        "mod": [],
        "voco": ["data.images=2400", "steps=900"],
        "flexattention": [],
        "remember": ["data.images=700"],  # so do the levels of the tower that it reads
    },
    "pocket-hd": {
        "falcon": [
            "reducer.options.reatten=32", "data.images=160", "data.val_images=8", "steps=400", "val_budgets=[64]",
            "table_budgets=[64]", "baselines=[]",
        ],
        "flexattention": [
            "reducer.options.short=pool", "data.images=160", "data.val_images=12", "steps=480",
            "budgets=[288,576]", "val_budgets=[576]", "table_budgets=[576]", "baselines=[overview,pool,cdpruner]",
        ],
    },
}  # fmt: skip


# A call before that: covipal learns to choose first, and then what stands for the rest.
FIRST: dict[str, dict[str, list[str]]] = {
    "pocket": {"covipal": ["guide_steps=250", "steps=1100"]}, "pocket-hd": {},
}  # fmt: skip


def calls(name: str, seed: int, asked: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """The calls that make one, in order: where each puts what it makes, and its settings."""
    world, output = Path(asked.backbone).name, asked.work / named(name, seed)
    given = [f"reducer={name}", f"seed={seed}", f"backbone={asked.backbone}", f"preset={world}", *COMMON[world]]
    first = before(output)
    if name not in FIRST[world]:
        return [(output, [*given, f"output={output}", *LONGER[world][name], *asked.set])]
    return [
        (first, [*given, f"output={first}", *FIRST[world][name], *asked.set]),
        (output, [*given, f"output={output}", *LONGER[world][name], f"init_from={first / PLUGIN}", *asked.set]),
    ]


def before(output: Path) -> Path:
    """Where the call before puts what it makes."""
    return output.with_name(f"{output.name}-first")


def named(name: str, seed: int) -> str:
    """The folder of a plug-in."""
    return name if seed == 0 else f"{name}-seed{seed}"


def make(name: str, seed: int, asked: argparse.Namespace) -> str:
    """Trains one and puts it into its place, or adds the table that it lacks; returns a line for the user."""
    target = asked.folder / named(name, seed)
    if (target / CONFIG).is_file():
        if load_plugin(target)[1].backbone.hash != load_backbone(asked.backbone).identity.hash:
            return f"{target} is of another backbone: remove it first"
    else:
        for output, given in calls(name, seed, asked):
            done = (output / PLUGIN / CONFIG).is_file()
            if not done and not called([str(ROOT / "train.py"), *given, "table_budgets=[]"], output / LOG):
                return f"{target} failed, see {output / LOG}"
        ship(output, target, resolved(given).table_budgets)
    told = (target / TABLE).is_file() or (Path(asked.backbone).name == "pocket" and name != "covipal")
    if seed or asked.train_only or told:
        return f"{target} is there"
    log = asked.work / target.name / "table.log"
    if not called([__file__, str(asked.folder), "--table", name], log):
        return f"{target} is there, but its table failed, see {log}"
    return f"{target} is there, with its table"


def called(command: list[str], log: Path) -> bool:
    """Runs Python on a command, with one thread, what it says into a file; returns whether all went well."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return not subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=file, stderr=file, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ).returncode  # fmt: skip


def resolved(given: list[str]) -> TrainSettings:
    """The settings that words mean."""
    return settings.resolve(TrainSettings, given, settings.configs_dir(), "train")


def ship(output: Path, target: Path, budgets: list[int]) -> None:
    """Puts what a call made, and the settings it had, into place; with those of the call before."""
    had, first = resolved([f"config={output / 'settings.yaml'}"]), before(output)
    with atomic_folder(target) as partial:
        shutil.copytree(output / PLUGIN, partial, dirs_exist_ok=True)
        settings.save(replace(had, table_budgets=budgets), Path(partial) / SETTINGS)
        if (first / PLUGIN / CONFIG).is_file():
            shutil.copy(first / "settings.yaml", Path(partial) / BEFORE)
            reducer, config = load_plugin(partial)
            began = load_plugin(first / PLUGIN)[1].metrics["trained_on"]
            config.metrics["trained_on"] = f"first {began}, then {config.metrics['trained_on']}"
            save_plugin(partial, reducer, config, {"notes": notes(had)})


def add_table(target: Path) -> None:
    """Compares a plug-in with the baselines and puts table and card beside its weights."""
    chosen = resolved([f"config={target / SETTINGS}"])
    reducer, config = load_plugin(target)
    output = Path(chosen.output)
    write_table(chosen, load_backbone(chosen.backbone.name, chosen.backbone.dtype), reducer, config, output, target)
    shutil.copy(output / TABLE, target)


def add_figures(folder: Path, report: dict[str, Any]) -> None:
    """Writes the figures of the table of all into the cards of its plug-ins, but where a table of their own is.

    Accuracy is the plug-in's own; relative to all tokens it is the mean over seeds, with its interval.
    """
    whole = report["scores"][0]["accuracy"]
    for name, facts in report["reducers"].items():
        budgets = by_budget(report, name)
        for number, seed in enumerate(facts["seeds"] if facts["trained"] else []):
            if not budgets or not (folder / seed / CONFIG).is_file() or (folder / seed / TABLE).is_file():
                continue
            reducer, config = load_plugin(folder / seed)
            timed = {at: each for at, each in budgets.items() if "first_token_ms" in each}
            config.metrics = {
                "accuracy": {"all": whole} | {at: each["each"][number] * whole for at, each in budgets.items()},
                "of_all_tokens": {at: [each["relative"], each["relative_low"], each["relative_high"]]
                                  for at, each in budgets.items()},
                **{phase: {at: each[phase]["median"] for at, each in timed.items()}
                   for phase in ("first_token_ms", "reducer_ms") if timed},
                **{key: value for key, value in config.metrics.items() if not isinstance(value, dict)},
            }  # fmt: skip
            made = notes(resolved([f"config={folder / seed / SETTINGS}"]))
            scored = f"Scored on {report['rows']} test questions; of_all_tokens: mean over {len(facts['seeds'])} seeds."
            save_plugin(
                folder / seed, reducer, config, {"notes": " ".join([made, scored, *shortfalls(budgets, report)])}
            )


def by_budget(report: dict[str, Any], name: str) -> dict[str, Any]:
    """The entries of one reducer that are relative to all tokens, by budget."""
    return {str(each["keep"]): each for each in report["scores"] if each["reducer"] == name and "relative" in each}


def shortfalls(budgets: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """Says where a plug-in is no better than the plainest baselines, average pooling and CLS attention's best."""
    found = [
        f"{name} at {at}"
        for name in ("pool", "fastervlm")
        for at, baseline in by_budget(report, name).items()
        if at in budgets and budgets[at]["relative"] <= baseline["relative"]
    ]
    return [f"No better than {', '.join(found)} tokens."] if found else []


def main() -> None:
    """Makes all that are asked for and missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [folder] [options]"
    )
    parser.add_argument("folder", nargs="?", type=Path, help="of the plug-ins, by default that of the backbone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of weights and question order")
    parser.add_argument("--names", nargs="+", metavar="NAME", help=", ".join(LONGER["pocket"]))
    parser.add_argument("--backbone", default="pocket", help="pocket, pocket-hd or a folder of that name")
    parser.add_argument("--work", type=Path, help="checkpoints and logs; by default outputs/plugins/BACKBONE")
    parser.add_argument("--jobs", type=int, default=2, help="calls at a time, a thread each")
    parser.add_argument("--train-only", action="store_true", help="no tables")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of train.py")
    parser.add_argument("--table", metavar="NAME", help="only the table of one that is there")
    parser.add_argument("--cards", metavar="JSON", type=Path, help="only the cards, from the table of all")
    asked = parser.parse_args()
    world = Path(asked.backbone).name
    if world not in LONGER:
        parser.error(f"--backbone {asked.backbone}: use {', '.join(LONGER)} or a folder of that name")
    if wrong := set(asked.names or []) - set(LONGER[world]):
        parser.error(f"--names {' '.join(wrong)}: for {world} use {', '.join(LONGER[world])}")
    asked.folder = (asked.folder or ROOT / "checkpoints" / world).resolve()
    asked.work = asked.work or Path("outputs") / "plugins" / world
    if asked.table:
        add_table(asked.folder / asked.table)
        return
    if asked.cards:
        add_figures(asked.folder, json.loads(asked.cards.read_text()))
        return
    with ThreadPoolExecutor(asked.jobs) as pool:
        wanted = [(name, seed) for seed in asked.seeds for name in asked.names or LONGER[world]]
        for line in pool.map(lambda one: make(*one, asked), wanted):
            print(line, flush=True)


if __name__ == "__main__":
    main()
