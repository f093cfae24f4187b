"""The plain model that cannot see what a reducer drops: the reference of the runtime's tests.

`hide` is for reducers before the language model: one mask over the prompt. `Hidden` is for those inside it: eager
attention, nothing removed, one image at a time, whole attention maps: everything that the runtime avoids. Masks hide
dropped tokens from their layer on; merged ones are written over; tokens that skip a layer are put back after it.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_reduce.backbones.families import family_of
from lit_reduce.reducer import Reducer
from lit_reduce.runtime import encode
from lit_reduce.runtime.cache_compat import cache_in
from lit_reduce.tokens import Budget, Course, Reduction, VisualTokens


@torch.no_grad()
def hide(tiny: Any, inputs: dict[str, Any], reducer: Reducer, keep: float) -> dict[str, Any]:
    """The full prompt, in which the mask hides what the reducer drops of each picture; positions as ever."""
    model, ids, mask = tiny.model, inputs["input_ids"], inputs["attention_mask"]
    kind = "image" if tiny.token == model.config.image_token_id else "video"
    encoded = encode(model, inputs, reducer.signals)
    stays, new = [], []
    for i, x in enumerate(encoded.features):
        out = reducer(encoded.tokens([i], reducer.signals), max(1, int(keep * len(x) + 0.5)))
        real = out.kept_indices[0] if out.valid is None else out.kept_indices[0][out.valid[0]]
        rows = x[real] if out.features is None else out.features[0][: len(real)]
        stays.append(torch.zeros(len(x), dtype=torch.bool).index_fill(0, real, True))
        new.append(x.index_copy(0, real, rows.to(x.dtype)))
    read = getattr(model.base_model, f"get_{kind}_features")
    names = {"pixel_values", "pixel_values_videos", "image_sizes", "image_grid_thw", "video_grid_thw"}
    plain = read(**{name: x for name, x in inputs.items() if name in names}, return_dict=True)
    flat = torch.cat(new)
    pooled = plain.pooler_output
    assert torch.equal(torch.cat(encoded.features), torch.cat([x.flatten(0, -2) for x in pooled]))
    whole = isinstance(pooled, torch.Tensor)
    features = flat.view_as(pooled) if whole else list(flat.split([len(x) for x in pooled]))
    plain.pooler_output = features
    seen = mask.bool().masked_scatter(ids == tiny.token, torch.cat(stays))
    places = model._prepare_position_ids_for_generation(ids, dict(inputs))
    kept = {name: x for name, x in inputs.items() if name.endswith("token_type_ids")}
    return (
        {"input_ids": ids, "attention_mask": seen.long(), "position_ids": places}
        | kept
        | {"mm_encoder_outputs": {kind: plain}}
    )


class Hidden:
    """Hooks on a plain model, while the ``with`` block lasts."""

    def __init__(
        self,
        tiny: Any,
        decoder: Reducer | None = None,
        cache: Reducer | None = None,
        keep: Any = 4,
        times: int = 1,
        answer: int = 0,
    ) -> None:
        self.model, self.lm, self.keep = tiny.model, tiny.model.get_decoder(), keep
        self.decoder, self.cache, self.last = decoder, cache, -1 - answer
        ids = tiny.inputs["input_ids"].repeat_interleave(times, 0)
        self.real = tiny.inputs["attention_mask"].repeat_interleave(times, 0).bool()
        self.length, self.depth = ids.shape[1], len(self.lm.layers)
        self.visual = ids == tiny.token
        self.images = [(b, run) for b in range(len(ids)) for run in _runs(self.visual[b])]
        once = iter(family_of(tiny.model.config).grids(tiny.model, tiny.inputs))
        grids = [
            # A prompt that is short already has tokens of its images, and no images.
            [next(once, (1, 1, len(run))) for run in _runs(visual)]
            for visual in tiny.inputs["input_ids"] == tiny.token
        ]
        self.grids = [grid for one in grids for _ in range(times) for grid in one]

    def __enter__(self) -> "Hidden":
        self.before = self.lm.config._attn_implementation
        self.model.set_attn_implementation("eager")
        self.weights: dict[int, Tensor] = {}
        self.alive: dict[int, list[Tensor]] = {}
        self.gone = torch.zeros(self.depth, len(self.real), self.length, dtype=torch.bool)
        self.late = self.gone.clone()
        self.handles = []
        for number, layer in enumerate(self.lm.layers):
            self.handles += [
                layer.register_forward_pre_hook(partial(self._before, number), with_kwargs=True),
                layer.register_forward_hook(partial(self._after, number)),
                layer.self_attn.register_forward_hook(partial(self._look, number)),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.model.set_attn_implementation(self.before)

    def seen(self, cache: Any, layer: Any) -> int:
        """Tokens in a layer's cache."""
        return int(cache.get_seq_length(layer.self_attn.layer_idx))

    def _look(self, number: int, _: Any, __: Any, out: Any) -> None:
        self.weights[number] = out[1]

    def _stage(
        self, reducer: Reducer, count: int, image: int, columns: Tensor, x: Tensor, weights: Tensor, number: int
    ) -> Reduction:
        """One image alone, its signals cut out of the whole map."""
        row, whole = self.images[image]
        text = (self.real & ~self.visual)[row].nonzero()[:, 0]
        rows = weights[row].mean(0)
        signals = {
            "last": rows[self.length + self.last, columns][None],
            "text_rows": rows[text][:, columns][None],
            "text_rows@0": self.weights.get(0, weights)[row].mean(0)[text][:, columns][None],
            "text_mask": torch.ones(1, len(text), dtype=torch.bool),
            "image_rows": rows[columns][:, columns][None],
            "place": torch.searchsorted(whole, columns)[None],
            "gate": torch.ones(1, len(columns)),
        }
        course = Course(self.depth, len(whole), self._budget(whole), torch.tensor([float(self.spent[image])]))
        return reducer(VisualTokens(x[None], self.grids[image], signals, number, course), count)

    def _budget(self, whole: Tensor) -> int:
        return Budget.parse(self.keep).count(len(whole))

    def _before(self, number: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, cache = args[0], cache_in(kwargs)
        # A second turn on the same cache is no prefill, however long it is.
        self.prefill = hidden.shape[1] >= self.length and (cache is None or self.seen(cache, layer) == 0)
        past = 0 if cache is None else self.seen(cache, layer)
        if self.prefill:
            hidden = self._decide(number, hidden)
        mask, total = kwargs["attention_mask"], past + hidden.shape[1]
        gone = self.gone[number] if self.prefill else self.gone[number] | self.late[number]
        columns = torch.nn.functional.pad(gone, (0, total - self.length))[
            :, total - mask.shape[-1] :
        ]  # sliding: the last
        low = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return (hidden, *args[1:]), kwargs | {"attention_mask": mask.masked_fill(columns[:, None, None], low)}

    def _decide(self, number: int, hidden: Tensor) -> Tensor:
        if number == 0:
            self.weights.clear()
            self.alive = {0: [columns for _, columns in self.images]}
            self.spent = [0] * len(self.images)
            self.gone.fill_(False)
        alive = self.alive[number]
        self.passed, self.weight = hidden, hidden.new_ones(len(hidden), hidden.shape[1], 1)
        skips = self.decoder is not None and self.decoder.kind == "skip"
        if number and not skips:
            self.gone[number] = self.gone[number - 1]
        self.alive[number + 1] = list(alive)
        for i, (row, whole) in enumerate(self.images):
            if self.decoder is None:
                break
            stages = self.decoder.stages(self.depth, len(whole), Budget.parse(self.keep).count(len(whole)))
            columns = alive[i]
            open_ = (
                self.decoder.adaptive_count
                and number in stages
                and self._budget(whole) < len(whole)
                and len(columns) > 1
            )
            if stages.get(number, len(columns)) >= len(columns) and not open_:
                continue
            count = min(stages[number], len(columns) - 1)
            weights = self.weights[number - 1] if number else hidden.new_zeros(len(self.real), 1, *[self.length] * 2)
            out = self._stage(self.decoder, count, i, columns, hidden[row, columns], weights, number)
            stay = out.kept_indices[0] if out.valid is None else out.kept_indices[0][out.valid[0]]
            if out.features is not None:
                hidden = hidden.clone()
                hidden[row, columns[stay]] = out.features[0, : len(stay)]
            self.gone[number, row, columns] = True
            self.gone[number, row, columns[stay]] = False
            if out.weight is not None:
                self.weight[row, columns, 0] = out.weight[0]
            if not skips:
                self.alive[number + 1][i] = columns[stay]
        self.spent = [now + len(x) for now, x in zip(self.spent, self.alive[number + 1], strict=True)]
        return hidden

    def _after(self, number: int, _: Any, __: Any, out: Tensor) -> Tensor:
        if not self.prefill:
            return out
        if self.cache is not None:
            for i, ((row, whole), columns) in enumerate(zip(self.images, self.alive[number + 1], strict=True)):
                count = self.cache.stages(self.depth, len(whole), Budget.parse(self.keep).count(len(whole)))[number]
                self.late[number, row, columns] = count < len(columns)
                if count < len(columns):
                    x, weights = out.new_zeros(len(columns), 1), self.weights[number]
                    choice = self._stage(self.cache, count, i, columns, x, weights, number)
                    self.late[number, row, columns[choice.kept_indices[0]]] = False
        if self.decoder is not None and self.decoder.kind == "skip":
            gone = self._padded(self.gone[number], out.shape[1])[..., None]
            return torch.where(gone, self.weight * self.passed, self.passed + self.weight * (out - self.passed))
        return out

    def _padded(self, gone: Tensor, total: int) -> Tensor:
        return torch.nn.functional.pad(gone, (0, total - self.length))


def _runs(visual: Tensor) -> list[Tensor]:
    """Columns of each image of a sample: the tests' prompts have words between images."""
    places = visual.nonzero()[:, 0]
    cuts = (places.diff() > 1).nonzero()[:, 0] + 1
    return list(places.tensor_split(cuts.tolist()))
