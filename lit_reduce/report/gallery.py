"""Example questions with what every reducer kept of the picture and what the model answered."""

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest

from lit_reduce.backbones import Backbone
from lit_reduce.data.jsonl import Row
from lit_reduce.evaluate.results import ALL_TOKENS, Results
from lit_reduce.inference.spec import ReducerSpec, generate, visual_counts
from lit_reduce.report.html import Example, Panel
from lit_reduce.report.model_view import model_view
from lit_reduce.report.overlay import overlay, paintable


def examples_of(rows: Sequence[Row], count: int) -> list[int]:
    """Indices of rows to show: the kinds of questions in turn, each in the order of the file."""
    kinds: dict[str | None, list[int]] = {}
    for index, row in enumerate(rows):
        kinds.setdefault(row.family, []).append(index)
    turns = chain.from_iterable(zip_longest(*kinds.values()))
    return [index for index in turns if index is not None][:count]


def gallery(
    backbone: Backbone,
    specs: Mapping[str, ReducerSpec],
    results: Results,
    rows: Sequence[Row],
    count: int,
    keep: int | float,
) -> list[Example]:
    """Make ``count`` examples at the budget ``keep``; a reducer that failed there is left out."""
    made = []
    for index in examples_of(rows, count):
        row = rows[index]
        inputs = backbone.prepare([row.open()], [row.prompt])
        picture, total = model_view(backbone, inputs, row.open()), visual_counts(backbone, inputs)[0]
        whole = results.score(ALL_TOKENS, None)
        panels = [Panel(ALL_TOKENS, picture, whole.answers[index], bool(whole.correct[index]))]
        for name, spec in specs.items():
            score = results.score(name, keep)
            if score.error is not None:
                continue
            _, prompt_map = generate(backbone, inputs, ReducerSpec(spec.reducer, keep, spec.positions), 1)
            painted = None
            if prompt_map is not None and prompt_map.grids and paintable(prompt_map.grids[0], total):
                kept = prompt_map.kept_indices[0].tolist()
                painted = overlay(picture, prompt_map.grids[0], total, kept, shortest=336)
            panels.append(Panel(name, painted, score.answers[index], bool(score.correct[index])))
        expected = row.answer if isinstance(row.answer, list) else [row.answer or ""]
        made.append(Example(row.prompt, " / ".join(expected), panels))
    return made
