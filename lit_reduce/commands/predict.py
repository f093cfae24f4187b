"""``predict``: answer a question about one picture, or a whole file of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image
from tqdm import tqdm

from lit_reduce import settings
from lit_reduce.backbones import Backbone, load_backbone
from lit_reduce.benchmark.latency import first_token
from lit_reduce.data.images import open_image
from lit_reduce.data.jsonl import Row, read_rows
from lit_reduce.errors import UserError
from lit_reduce.files import atomic_path, check_writable
from lit_reduce.inference.resumable_jsonl import answer_rows
from lit_reduce.inference.spec import ReducerSpec, find_spec, generate, visual_counts
from lit_reduce.report.model_view import seen
from lit_reduce.report.overlay import overlay, paintable
from lit_reduce.settings import BackboneSettings, ReducerSettings


@dataclass
class PredictSettings:
    """Settings of ``predict``; ``configs/predict.yaml`` explains each."""

    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    reducer: ReducerSettings = field(default_factory=ReducerSettings)
    keep: int | float = 64
    image: str | None = None
    prompt: str | None = None
    input: str | None = None
    output: str | None = None
    overlay: str | None = None
    json: bool = False
    max_new_tokens: int = 32
    batch_size: int = 8
    runs: int = 5
    on_error: str = "stop"


def predict(chosen: PredictSettings) -> None:
    """Answer one question (``image`` and ``prompt``) or a file of them (``input`` and ``output``); prints the result.

    Everything that can be wrong with the words of the user is checked before the backbone is loaded.

    Raises:
        UserError: A setting, a picture, a file or the plug-in is not usable.
    """
    for name in ("max_new_tokens", "batch_size", "runs"):
        if getattr(chosen, name) < 1:
            raise UserError(f"{name}={getattr(chosen, name)}: give 1 or more")
    if chosen.on_error not in ("stop", "record"):
        raise UserError(f"on_error={chosen.on_error} is not known: use stop or record")
    if chosen.input is not None or chosen.output is not None:
        _predict_file(chosen)
    else:
        _predict_one(chosen)


def _predict_one(chosen: PredictSettings) -> None:
    if chosen.image is None:
        raise UserError("no image is given: write image=FILE prompt=TEXT, or input=FILE.jsonl output=FILE.jsonl")
    if chosen.prompt is None or not chosen.prompt.strip():
        raise UserError('the prompt is empty: write prompt="What is in the picture?"')
    plan = find_spec(chosen.reducer, chosen.keep)
    picture = open_image(chosen.image)
    if chosen.overlay is not None:
        _check_overlay(chosen.overlay)
    backbone = _load(chosen.backbone, plan)
    inputs = backbone.prepare([picture], [chosen.prompt])
    total, grid = sum(visual_counts(backbone, inputs)), backbone.family.grids(backbone.model, inputs)[0]
    if chosen.overlay is not None and not paintable(grid, total):
        raise UserError(f"overlay={chosen.overlay}: this model's tiles of a picture do not form one grid; leave it out")
    (answer,), logical = generate(backbone, inputs, plan, chosen.max_new_tokens)
    kept = total if logical is None else sum(logical.kept)
    plans = {"plain": ReducerSpec()} if logical is None else {"plain": ReducerSpec(), "reduced": plan}
    timings = first_token(backbone, inputs, plans, chosen.runs)
    plain, reduced = timings["plain"], timings.get("reduced", timings["plain"])
    if chosen.overlay is not None:
        kept_indices = list(range(total)) if logical is None else logical.kept_indices[0].tolist()
        painted = overlay(seen(backbone, inputs, picture), grid, total, kept_indices)
        with atomic_path(chosen.overlay) as temporary:
            painted.save(temporary)
        settings.save(chosen, settings.beside(chosen.overlay))
    own = reduced.reducer_ms or 0.0
    if chosen.json:
        record = {"answer": answer, "visual_tokens": total, "kept_tokens": kept, "reducer_ms": round(own, 3)}
        record |= {"ttft_ms": round(reduced.median, 3), "ttft_plain_ms": round(plain.median, 3)}
        if logical is not None and logical.layers:  # layers read different counts
            record["tokens_per_layer"] = round(sum(logical.layers), 1)
        print(json.dumps(record, ensure_ascii=False))
        return
    print(f"answer       {answer}")
    print(f"tokens kept  {kept} of {total}")
    if logical is not None and logical.layers:
        print(f"             {sum(logical.layers):.1f} in a layer of the language model, on average")
    if logical is not None:
        print(f"first token  {reduced.median:.1f} ms with the reducer, {own:.2f} ms of them its own")
    print(f"             {plain.median:.1f} ms with all tokens (medians of {chosen.runs} alternating runs)")
    if chosen.overlay is not None:
        print(f"overlay      {chosen.overlay}")


def _predict_file(chosen: PredictSettings) -> None:
    if chosen.input is None or chosen.output is None:
        raise UserError("input and output belong together: write input=FILE.jsonl output=FILE.jsonl")
    for name in ("image", "prompt", "overlay"):
        if getattr(chosen, name) is not None:
            raise UserError(f"{name} is for one picture: leave it out beside input and output")
    source, output = Path(chosen.input), Path(chosen.output)
    if source.resolve() == output.resolve():
        raise UserError(f"input and output are both {source}: give another output")
    plan = find_spec(chosen.reducer, chosen.keep)
    rows = read_rows(source, check_images=chosen.on_error == "stop")
    check_writable(output)
    _check_same_settings(chosen, output)
    backbone = _load(chosen.backbone, plan)
    settings.save(chosen, settings.beside(output))
    with tqdm(total=len(rows), unit="row", desc="predict") as bar:
        _, done = answer_rows(
            rows, output, lambda batch: _answer_batch(backbone, plan, batch, chosen), chosen.batch_size, bar.update
        )
    summary = {"rows": len(rows), "done_before": done, "output": str(output)}
    print(json.dumps(summary) if chosen.json else f"{len(rows)} rows in {output}, {done} of them from earlier runs")


def _answer_batch(
    backbone: Backbone, plan: ReducerSpec, rows: Sequence[Row], chosen: PredictSettings
) -> list[dict[str, Any]]:
    """What to write for each row; with ``on_error=record`` a picture that does not open becomes an ``error``."""
    records: list[dict[str, Any]] = [{} for _ in rows]
    good: list[tuple[dict[str, Any], Row, Image.Image]] = []
    for record, row in zip(records, rows, strict=True):
        try:
            good.append((record, row, row.open()))
        except UserError as error:
            if chosen.on_error == "stop":
                raise
            record["error"] = str(error)
    if not good:
        return records
    inputs = backbone.prepare([picture for _, _, picture in good], [row.prompt for _, row, _ in good])
    answers, logical = generate(backbone, inputs, plan, chosen.max_new_tokens)
    totals = visual_counts(backbone, inputs)
    kept = totals if logical is None else logical.kept
    for (record, _, _), answer, total, stayed in zip(good, answers, totals, kept, strict=True):
        record |= {"answer": answer, "visual_tokens": total, "kept_tokens": stayed}
    return records


def _load(chosen: BackboneSettings, plan: ReducerSpec) -> Backbone:
    backbone = load_backbone(chosen.name, chosen.dtype, chosen.device, chosen.revision)
    plan.check(backbone)
    return backbone


def _check_overlay(path: str) -> None:
    known = Image.registered_extensions()
    if known.get(Path(path).suffix.lower()) not in Image.SAVE:
        raise UserError(f"overlay={path} does not end like a picture: use a name such as overlay.png")
    check_writable(path)


def _check_same_settings(chosen: PredictSettings, output: Path) -> None:
    """Answers of two different settings must not end up in one file."""
    saved = settings.beside(output)
    if not saved.is_file() or not output.is_file() or output.stat().st_size == 0:
        return
    before: Any = OmegaConf.to_container(OmegaConf.load(saved))
    now: Any = OmegaConf.to_container(OmegaConf.create(settings.to_yaml(chosen)))
    for name in ("backbone", "reducer", "keep", "max_new_tokens"):
        if before.get(name) != now[name]:
            raise UserError(f"{output} was begun with another {name} (see {saved}): give another output")
