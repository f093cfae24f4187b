"""``lit-reduce predict``: answer a question about one picture, or a whole file of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from lit_reduce import settings as files
from lit_reduce.backbones import Backbone, load_backbone
from lit_reduce.benchmark.latency import first_token
from lit_reduce.commands.logs import quiet_transformers
from lit_reduce.data.images import open_image
from lit_reduce.data.jsonl import read_rows
from lit_reduce.errors import UserError
from lit_reduce.files import atomic_path, check_writable
from lit_reduce.inference.answer_batch import answer_batch
from lit_reduce.inference.answered_with import check_same, resolved, save_with
from lit_reduce.inference.resumable_jsonl import answer_rows, open_answers
from lit_reduce.inference.spec import ReducerSpec, find_spec, generate, visual_counts
from lit_reduce.report.model_view import model_view
from lit_reduce.report.overlay import overlay, paintable
from lit_reduce.settings import BackboneSettings
from lit_reduce.settings.predict import PredictSettings


def main(argv: Sequence[str]) -> None:
    """Run the command on the words behind its name."""
    settings = files.resolve(PredictSettings, argv, files.configs_dir(), "predict")
    quiet_transformers()
    predict(settings)


def predict(settings: PredictSettings) -> None:
    """Answer one question (``image`` and ``prompt``) or a file of them (``input`` and ``output``); prints the result.

    All settings are checked before the backbone is loaded.

    Raises:
        UserError: A setting, a picture, a file or the plug-in is not usable.
    """
    files.check(settings)
    if settings.input is not None or settings.output is not None:
        _predict_file(settings)
    else:
        _predict_one(settings)


def _predict_one(settings: PredictSettings) -> None:
    if settings.image is None:
        raise UserError("no image is given: write image=FILE prompt=TEXT, or input=FILE.jsonl output=FILE.jsonl")
    if settings.prompt is None or not settings.prompt.strip():
        raise UserError('the prompt is empty: write prompt="What is in the picture?"')
    spec = find_spec(settings.reducer, settings.keep)
    picture = open_image(settings.image)
    if settings.overlay is not None:
        _check_overlay(settings.overlay)
    backbone = _load(settings.backbone, spec)
    inputs = backbone.prepare([picture], [settings.prompt])
    total, grid = sum(visual_counts(backbone, inputs)), backbone.family.grids(backbone.model, inputs)[0]
    if settings.overlay is not None and not paintable(grid, total):
        raise UserError(
            f"overlay={settings.overlay}: this model's tiles of a picture do not form one grid; leave it out"
        )
    (answer,), prompt_map = generate(backbone, inputs, spec, settings.max_new_tokens)
    record: dict[str, Any] = {"answer": answer, "visual_tokens": total}
    record["kept_tokens"] = total if prompt_map is None else sum(prompt_map.kept)
    record |= _times(backbone, inputs, spec, settings.runs)
    if prompt_map is not None and prompt_map.layers:  # layers read different counts
        record["tokens_per_layer"] = round(sum(prompt_map.layers), 1)
    if settings.overlay is not None:
        kept = list(range(total)) if prompt_map is None else prompt_map.kept_indices[0].tolist()
        painted = overlay(model_view(backbone, inputs, picture), grid, total, kept)
        with atomic_path(settings.overlay) as temporary:
            painted.save(temporary)
        save_with(resolved(settings, backbone), settings.overlay, backbone, spec)
    print(json.dumps(record, ensure_ascii=False) if settings.json else _words(settings, record))


def _times(backbone: Backbone, inputs: dict[str, Any], spec: ReducerSpec, runs: int) -> dict[str, float]:
    """Medians in milliseconds over ``runs`` alternating runs with and without the reducer; empty without runs."""
    if not runs:
        return {}
    specs = {"plain": ReducerSpec()} | ({} if spec.reducer is None else {"reduced": spec})
    timings = first_token(backbone, inputs, specs, runs)
    plain, reduced = timings["plain"], timings.get("reduced", timings["plain"])
    own = 0.0 if reduced.reducer is None else reduced.reducer.median
    times = {"reducer_ms": own, "ttft_ms": reduced.first_token.median, "ttft_plain_ms": plain.first_token.median}
    return {name: round(time, 3) for name, time in times.items()}


def _words(settings: PredictSettings, record: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"answer       {record['answer']}",
        f"tokens kept  {record['kept_tokens']} of {record['visual_tokens']}",
    ]
    if "tokens_per_layer" in record:
        lines.append(f"             {record['tokens_per_layer']} in a layer of the language model, on average")
    if "ttft_ms" not in record:
        lines.append("first token  not timed; runs=5 times it")
    else:
        if settings.reducer.name != "none":
            own = f"{record['reducer_ms']:.2f} ms of them in the reducer itself"
            lines.append(f"first token  {record['ttft_ms']:.1f} ms with the reducer, {own}")
        head = "             " if settings.reducer.name != "none" else "first token  "
        runs = f"medians of {settings.runs} alternating runs"
        lines.append(f"{head}{record['ttft_plain_ms']:.1f} ms with all tokens ({runs})")
    if settings.overlay is not None:
        lines.append(f"overlay      {settings.overlay}")
    return "\n".join(lines)


def _predict_file(settings: PredictSettings) -> None:
    if settings.input is None or settings.output is None:
        raise UserError("input and output belong together: write input=FILE.jsonl output=FILE.jsonl")
    for name in ("image", "prompt", "overlay"):
        if getattr(settings, name) is not None:
            raise UserError(f"{name} is for one picture: leave it out beside input and output")
    source, output = Path(settings.input), Path(settings.output)
    if source.resolve() == output.resolve():
        raise UserError(f"input and output are both {source}: give another output")
    spec = find_spec(settings.reducer, settings.keep)
    rows = read_rows(source, check_images=settings.on_error == "stop")
    check_writable(output)
    with open_answers(output, rows) as opened:
        backbone, done = _load(settings.backbone, spec), opened.done
        settings = resolved(settings, backbone)
        if done:
            check_same(settings, output, backbone, spec)
        else:
            save_with(settings, output, backbone, spec)
        with tqdm(total=len(rows), unit="row", desc="predict") as bar:
            answer_rows(
                rows, opened,
                lambda batch: answer_batch(backbone, spec, batch, settings.max_new_tokens, settings.on_error),
                settings.batch_size, bar.update,
            )  # fmt: skip
    summary = {"rows": len(rows), "done_before": done, "output": str(output)}
    print(json.dumps(summary) if settings.json else f"{len(rows)} rows in {output}, {done} of them from earlier runs")


def _load(settings: BackboneSettings, spec: ReducerSpec) -> Backbone:
    backbone = load_backbone(settings.name, settings.dtype, settings.device, settings.revision)
    spec.check(backbone)
    return backbone


def _check_overlay(path: str) -> None:
    known = Image.registered_extensions()
    if known.get(Path(path).suffix.lower()) not in Image.SAVE:
        raise UserError(f"overlay={path} does not end like a picture: use a name such as overlay.png")
    check_writable(path)
