"""``lit-reduce evaluate``: score one reducer on questions with answers and write the report."""

import json
from collections.abc import Sequence
from pathlib import Path

from lit_reduce import settings as files
from lit_reduce.backbones import Backbone
from lit_reduce.commands.logs import quiet_transformers
from lit_reduce.commands.scoring import check, open_backbone, questions, score
from lit_reduce.evaluate.results import Results
from lit_reduce.files import write_atomic
from lit_reduce.inference.answer_store import AnswerStore
from lit_reduce.inference.spec import find_spec
from lit_reduce.report.markdown import markdown
from lit_reduce.report.summary import Line, facts, summary
from lit_reduce.report.write import write_report
from lit_reduce.settings.evaluate import EvaluateSettings, ScoreSettings


def main(argv: Sequence[str]) -> None:
    """Run the command on the words behind its name."""
    settings = files.resolve(EvaluateSettings, argv, files.configs_dir(), "evaluate")
    quiet_transformers()
    evaluate(settings)


def evaluate(settings: EvaluateSettings) -> None:
    """Score the reducer at every budget; writes JSON, Markdown, a plot and all answers, prints the Markdown.

    Raises:
        UserError: A setting, the data, a picture or a plug-in is not usable.
    """
    keeps = check(settings, ".json")
    spec = find_spec(settings.reducer, keeps[0])
    specs = {} if spec.reducer is None else {spec.reducer.name: spec}
    rows, backbone = questions(settings), open_backbone(settings)
    store = temporary_store(settings.out, backbone, settings.max_new_tokens)
    results = score(settings, backbone, specs, keeps, rows, store, timing_runs=settings.runs)
    report = summary(results, {name: Line([name], facts=facts(spec)) for name, spec in specs.items()}, keeps)
    written = write_report(report, settings.out)
    print(markdown(report), end="")
    finish(settings, results, store, written)


def temporary_store(out: str, backbone: Backbone, max_new_tokens: int) -> AnswerStore:
    """Answers that are kept beside the report until it is written, so that a killed run goes on."""
    return AnswerStore(Path(out).with_suffix(".part"), backbone, max_new_tokens)


def finish(settings: ScoreSettings, results: Results, store: AnswerStore, written: list[Path]) -> None:
    """Write all answers and the settings beside a finished report, and say where all of it is."""
    out = Path(settings.out)
    answers = out.with_suffix(".rows.jsonl")
    write_atomic(answers, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in results.records))
    files.save(settings, files.beside(out))
    store.remove()
    print(f"written: {', '.join(str(path) for path in [*written, answers])}")
