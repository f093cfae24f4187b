"""``lit-reduce table``: the plug-ins of a backbone and baselines at every budget, scored, counted and timed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from lit_reduce import settings as files
from lit_reduce.backbones import Backbone
from lit_reduce.benchmark.costs import measure_costs
from lit_reduce.benchmark.machine import machine_facts
from lit_reduce.commands.logs import quiet_transformers
from lit_reduce.commands.scoring import check, open_backbone, questions, score
from lit_reduce.data.jsonl import Row
from lit_reduce.errors import UserError
from lit_reduce.evaluate.results import ALL_TOKENS, Results
from lit_reduce.inference.answer_store import AnswerStore
from lit_reduce.inference.spec import ReducerSpec, find_spec
from lit_reduce.inference.spec_list import find_specs
from lit_reduce.plugin import WEIGHTS
from lit_reduce.report.markdown import markdown
from lit_reduce.report.summary import Costs, Line, facts, summary
from lit_reduce.report.write import write_report
from lit_reduce.settings import ReducerSettings
from lit_reduce.settings.table import TableSettings


def main(argv: Sequence[str]) -> None:
    """Run the command on the words behind its name."""
    settings = files.resolve(TableSettings, argv, files.configs_dir(), "table")
    quiet_transformers()
    table(settings)


def table(settings: TableSettings) -> None:
    """Make the table: JSON, Markdown and a plot of accuracy against budget and measured time.

    A plug-in that is missing or fails becomes a line with its reason. Answers are kept by reducer and budget: a killed
    run goes on, and a further plug-in costs its own questions only.

    Raises:
        UserError: A setting, the data, the backbone or a baseline's name is not usable.
    """
    keeps = check(settings, ".json")
    lines, specs = find_lines(settings, keeps[0])
    rows, backbone = questions(settings), open_backbone(settings)
    store = AnswerStore(settings.answers, backbone, settings.max_new_tokens)
    results = score(settings, backbone, specs, keeps, rows, store, tolerant=True)
    costs = line_costs(settings, backbone, lines, specs, results, keeps, rows[0])
    report = machine_facts(backbone) | {"clock": settings.clock} | summary(results, lines, keeps, costs)
    written = write_report(report, settings.out)
    files.save(settings, files.beside(settings.out))
    print(markdown(report), end="")
    print(f"written: {', '.join(map(str, written))}")


def find_lines(settings: TableSettings, keep: int | float) -> tuple[dict[str, Line], dict[str, ReducerSpec]]:
    """The lines of the table, and the specs of all seeds in them, both by name.

    ``NAME``, ``NAME-seed1``, ``NAME-seed2``, ... below the folder of plug-ins are one line. A plug-in that does not
    load stands in its line with the reason.

    Raises:
        UserError: Two lines of one name, or an unknown baseline.
    """
    specs, broken = find_specs(settings.baselines, keep) if settings.baselines else ({}, {})
    baselines = {name: Line([name], facts=facts(spec)) for name, spec in specs.items()}
    baselines |= {name: Line([], {name: error}) for name, error in broken.items()}
    lines: dict[str, Line] = {}
    for name in settings.methods:
        if name in lines or name in baselines:
            raise UserError(f"the table has two lines for {name}: leave one out")
        line = lines[name] = Line([], facts={"trained": True})
        for folder in seeds_of(Path(settings.plugins), name):
            try:
                spec = find_spec(ReducerSettings(str(folder)), keep)
            except UserError as error:
                line.errors[folder.name] = str(error)
                continue
            specs[folder.name] = spec
            line.seeds.append(folder.name)
            line.facts = facts(spec) | {"bytes": (folder / WEIGHTS).stat().st_size}
    return lines | baselines, specs


def seeds_of(folder: Path, name: str) -> list[Path]:
    """The folders of one method's plug-ins; that of its name alone where there is none, so that it is missed."""
    return [folder / name, *sorted(path for path in folder.glob(f"{name}-seed*") if path.is_dir())]


def line_costs(
    settings: TableSettings, backbone: Backbone, lines: Mapping[str, Line], specs: Mapping[str, ReducerSpec],
    results: Results, keeps: Sequence[int | float], row: Row,
) -> Costs:  # fmt: skip
    """FLOPs and times of every line at every budget, on one question.

    The first sound seed speaks for its line: times do not depend on weights.
    """
    asked: dict[tuple[str, int | float | None], ReducerSpec] = {(ALL_TOKENS, None): ReducerSpec()}
    for name, line in lines.items():
        for keep in keeps:
            sound = [seed for seed in line.seeds if results.score(seed, keep).error is None]
            if sound:
                asked[name, keep] = replace(specs[sound[0]], keep=keep)
    inputs = backbone.prepare([row.open()], [row.prompt])
    with tqdm(total=len(asked) * settings.runs, unit="run", desc="times") as bar:
        return measure_costs(backbone, inputs, asked, settings.runs, settings.clock, bar.update)
