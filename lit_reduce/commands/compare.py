"""``lit-reduce compare``: reducers side by side on one page, with pictures of what each kept."""

from collections.abc import Sequence
from pathlib import Path

from lit_reduce import settings as files
from lit_reduce.commands.evaluate import finish, temporary_store
from lit_reduce.commands.logs import quiet_transformers
from lit_reduce.commands.scoring import check, open_backbone, questions, score
from lit_reduce.errors import UserError
from lit_reduce.files import write_atomic
from lit_reduce.inference.spec_list import find_specs
from lit_reduce.report.gallery import gallery
from lit_reduce.report.html import html_report
from lit_reduce.report.markdown import markdown
from lit_reduce.report.summary import Line, facts, summary
from lit_reduce.report.write import write_report
from lit_reduce.settings.compare import CompareSettings


def main(argv: Sequence[str]) -> None:
    """Run the command on the words behind its name."""
    settings = files.resolve(CompareSettings, argv, files.configs_dir(), "compare")
    quiet_transformers()
    compare(settings)


def compare(settings: CompareSettings) -> None:
    """Score all reducers at every budget on the same questions; writes a page, JSON, Markdown, a plot and all answers.

    A reducer that fails becomes a line with its reason, and the others go on.

    Raises:
        UserError: A setting, the data, a picture or a reducer's name is not usable.
    """
    keeps = check(settings, ".html")
    shown_at = settings.pictures_keep if settings.pictures_keep is not None else sorted(keeps)[(len(keeps) - 1) // 2]
    if shown_at not in keeps:
        raise UserError(f"pictures_keep={shown_at} is not among keep={keeps}")
    specs, broken = find_specs(settings.reducers, keeps[0])
    rows, backbone = questions(settings), open_backbone(settings)
    store = temporary_store(settings.out, backbone, settings.max_new_tokens)
    results = score(settings, backbone, specs, keeps, rows, store, timing_runs=settings.runs, tolerant=True)
    lines = {name: Line([name], facts=facts(spec)) for name, spec in specs.items()}
    lines |= {name: Line([], {name: error}) for name, error in broken.items()}
    report = summary(results, lines, keeps)
    out = Path(settings.out)
    written = write_report(report, out.with_suffix(".json"))
    examples = gallery(backbone, specs, results, rows, settings.pictures, shown_at)
    write_atomic(out, html_report(report, examples, shown_at))
    print(markdown(report), end="")
    finish(settings, results, store, [out, *written])
