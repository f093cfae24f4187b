"""What the commands that score reducers have in common: checks, questions, answers of earlier runs, a progress bar."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from tqdm import tqdm

from lit_reduce import options
from lit_reduce.backbones import Backbone, load_backbone
from lit_reduce.data.jsonl import Row
from lit_reduce.data.questions import scored_rows
from lit_reduce.errors import UserError
from lit_reduce.evaluate.evaluator import evaluate
from lit_reduce.evaluate.results import Results
from lit_reduce.files import check_writable
from lit_reduce.inference.answer_store import AnswerStore
from lit_reduce.inference.spec import ReducerSpec
from lit_reduce.registry import question_sets
from lit_reduce.settings.evaluate import ScoreSettings
from lit_reduce.tokens import Budget


def check(settings: ScoreSettings, suffix: str) -> list[int | float]:
    """Refuse settings that cannot work before anything is read or loaded; returns the budgets.

    Raises:
        UserError: One of them cannot.
    """
    options.check(settings)
    keeps = [
        Budget.parse(keep).value for keep in (settings.keep if isinstance(settings.keep, list) else [settings.keep])
    ]
    if Path(settings.out).suffix != suffix:
        raise UserError(f"out={settings.out}: give the report a name that ends in {suffix}")
    check_writable(settings.out)
    return list(dict.fromkeys(keeps))


def questions(settings: ScoreSettings) -> list[Row]:
    """The rows to score on: of a file, or of a question set that an installed package offers by name.

    Raises:
        UserError: No data, a file that is not usable, or a row without an answer.
    """
    if settings.data is None:
        known = "".join(f", or data={name}" for name in question_sets())
        raise UserError(f"no data are given: write data=FILE.jsonl with image, prompt and answer in each line{known}")
    return list(scored_rows(settings.data, settings.limit)[0])


def open_backbone(settings: ScoreSettings) -> Backbone:
    """Load the backbone that the settings name."""
    named = settings.backbone
    return load_backbone(named.name, named.dtype, named.device, named.revision)


def score(
    settings: ScoreSettings,
    backbone: Backbone,
    specs: Mapping[str, ReducerSpec],
    keeps: Sequence[int | float],
    rows: Sequence[Row],
    store: AnswerStore,
    *,
    timing_runs: int = 0,
    tolerant: bool = False,
) -> Results:
    """Ask all questions of all reducers but what the store already answers, with a progress bar."""
    if not tolerant:  # before there is a bar that an error would break into
        for spec, keep in product(specs.values(), keeps):
            replace(spec, keep=keep).check(backbone)
    with tqdm(total=len(rows), unit="row", desc="questions") as bar:
        return evaluate(
            backbone, specs, keeps, rows, settings.batch_size, bar.update, max_new_tokens=settings.max_new_tokens,
            timing_runs=timing_runs, store=store, tolerant=tolerant,
        )  # fmt: skip
