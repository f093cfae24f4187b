"""What ``generate`` and ``forward`` promise, kept on a shortened prompt.

Callers count in the tokens they passed: ``generate`` returns the full prompt before the answer and takes ``max_length``
in original tokens; ``forward`` returns logits for every original token (zero where one was dropped). Hidden states,
attentions and caches are those of the short prompt.
"""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_reduce.errors import UserError
from lit_reduce.runtime.cache_compat import CACHE, cache_in, cache_of
from lit_reduce.runtime.compact import PromptMap, positions_behind
from lit_reduce.runtime.conversation import History, cached_length, history_of, joined, plain_history, tail_of
from lit_reduce.runtime.encode import encoder_keys, placeholders

if TYPE_CHECKING:
    from lit_reduce.runtime.attach import Attachment

PROMPT = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
TIMES = "second_per_grid_ts"  # of videos: positions depend on it


def reduced_generate(
    self: "Attachment", inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """``generate`` of an attached model."""
    plain = self.original("generate")
    if inputs is not None:
        kwargs["input_ids"] = inputs
    cache = cache_in(kwargs)
    if not _is_told(self, kwargs, cache) and _lets_pass(self, kwargs, cache):
        with self.plain_forward():
            return plain(None, generation_config, *args, **kwargs)
    ids = kwargs["input_ids"]
    prompt = {name: kwargs.pop(name) for name in {*PROMPT, TIMES, *encoder_keys(self.model)} & kwargs.keys()}
    if prompt.get("attention_mask") is None:
        prompt["attention_mask"] = _guessed_mask(self.model, ids)
    _refuse_modes(self, generation_config or self.model.generation_config, kwargs)
    short, history = _short_prompt(self, prompt, cache)
    dropped = ids.shape[1] - short["input_ids"].shape[1]
    _count_lengths(generation_config or self.model.generation_config, kwargs, dropped)
    padded = kwargs.get("use_cache") is False
    short = _with_padding(short) if padded else short
    with self.plain_forward(), self.reading(padded, short["input_ids"].shape[1] - cached_length(cache)):
        out = plain(None, generation_config, *args, **short, **kwargs)
        self.record_inside()
    sequences = out if isinstance(out, Tensor) else out.sequences
    times = len(sequences) // len(ids)
    answer = sequences[:, short["input_ids"].shape[1] :]
    full = torch.cat([ids.to(sequences.device).repeat_interleave(times, 0), answer], 1)
    cache = cache if isinstance(out, Tensor) else getattr(out, CACHE, cache)
    if cache is not None:
        history.repeat(times).write(cache)
    if isinstance(out, Tensor):
        return full
    out.sequences = full
    return out


def reduced_forward(self: "Attachment", *args: Any, **kwargs: Any) -> Any:
    """``forward`` of an attached model: for training, and for decoding loops written by hand."""
    plain = self.original("forward")
    kwargs |= dict(zip(inspect.signature(plain).parameters, args, strict=False))
    cache = cache_in(kwargs)
    if not _is_told(self, kwargs, cache) and _lets_pass(self, kwargs, cache):
        return plain(**kwargs)
    ids, mask, history = kwargs["input_ids"], kwargs.get("attention_mask"), history_of(cache)
    if cached_length(cache):
        if history is None or self.family.kinds(kwargs):
            raise UserError("forward cannot take a new image on a cache; use generate with the whole conversation")
        return plain(**kwargs | _step(history, cached_length(cache), ids, kwargs))
    kwargs["attention_mask"] = mask = torch.ones_like(ids) if mask is None else mask
    wanted, at = kwargs.pop("return_dict", None), kwargs.pop("logits_to_keep", 0)
    short, logical = self.shorten(kwargs)
    few = isinstance(at, int) and at > 0 and _ends_alike(logical, at)  # then the short prompt's last ones are the same
    with self.reading():
        out = plain(**short, logits_to_keep=at if few else 0, return_dict=True)
        self.record_inside()
    if not few:
        logits = _restored(out.logits, logical)
        out.logits = logits[:, -at:] if isinstance(at, int) else logits[:, at]  # the slice -0: is the whole
    if (written := cache_of(out)) is not None:
        _history(self, ids, mask, short, logical).write(written)
    return out.to_tuple() if wanted is False else out


def _is_told(self: "Attachment", kwargs: dict[str, Any], cache: Any) -> bool:
    """Whether the caller gives a digest of the pictures; it is taken out of the arguments."""
    told = kwargs.pop("digest", None)
    if told is not None and (self.digesting is None or cached_length(cache)):
        raise UserError("a digest is for reducers such as voco and the first turn of a conversation; leave it out")
    if self.digesting is not None:
        self.digesting.given = told
    return told is not None


def _lets_pass(self: "Attachment", kwargs: dict[str, Any], cache: Any) -> bool:
    """Whether this call holds nothing to reduce and continues nothing that was reduced."""
    ids = kwargs.get("input_ids")
    if any(output is not None for output in (kwargs.get("mm_encoder_outputs") or {}).values()):
        raise UserError("an attached model reduces images itself; pass pixel_values, not mm_encoder_outputs")
    if history_of(cache) is not None:
        return False
    if not self.family.kinds(kwargs):
        self.record(0, 0)
        return True
    if ids is None:
        raise UserError("an attached model needs input_ids beside pixel_values; inputs_embeds hide where images are")
    tokens = int(placeholders(self.model, ids).sum())
    counts = [picture.count for picture in self.family.pictures(self.model, kwargs)]
    if cached_length(cache) == 0 and sum(counts) == tokens and self.keeps_all(counts):
        self.record(tokens, tokens)
        return True
    return False


def _short_prompt(self: "Attachment", prompt: dict[str, Any], cache: Any) -> tuple[dict[str, Any], History]:
    """The inputs of one call of ``generate``, and the history that it leaves on its cache."""
    ids, mask, cached = prompt["input_ids"], prompt["attention_mask"], cached_length(cache)
    if cached == 0:
        short, logical = self.shorten(prompt)
        return short, _history(self, ids, mask, short, logical)
    history = history_of(cache) or plain_history(ids, mask, cached, getattr(self.model.base_model, "rope_deltas", None))
    tail = tail_of(history, cached, ids, mask)
    done = tail.generated.shape[1]
    short = {"input_ids": tail.fresh, "attention_mask": tail.mask[:, done:], "position_ids": tail.positions[..., done:]}
    positions, seen = short["position_ids"], short["attention_mask"]
    if self.family.kinds(prompt) and bool(placeholders(self.model, tail.fresh).any()):
        if self.digesting is not None:
            raise UserError(
                "learned tokens read a picture with the words before it, not with a cache; "
                "pass the whole conversation and no cache"
            )
        if self.family.looks_ahead:
            raise UserError(
                f"a new image cannot follow a cache of '{self.family.name}', whose images are read in both directions; "
                "pass the whole conversation with all its images and no cache"
            )
        pictures = {name: prompt[name] for name in {TIMES, *encoder_keys(self.model)} & prompt.keys()}
        if positions.ndim == 3:
            positions = positions_behind(self.model, positions, short | pictures)
        short, _ = self.shorten(short | pictures | {"position_ids": positions})
        if self.positions == "renumber":
            before = history.next + tail.mask[:, :done].sum(1, keepdim=True)
            short["position_ids"] = positions = short["position_ids"] + before
            seen = short["attention_mask"]
    else:  # images of earlier turns are in the cache; whoever passes them again means the same
        self.record(0, 0)
    whole = joined(history, tail, short)
    return whole, History.after(ids, whole, positions, seen)


def _history(self: "Attachment", ids: Tensor, mask: Tensor, short: dict[str, Any], logical: PromptMap) -> History:
    if self.positions == "renumber":
        return History.after(ids, short, short["position_ids"], logical.valid)
    return History.after(ids, short, logical.positions, mask)


def _step(history: History, cached: int, ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Mask and positions of new tokens behind a shortened prompt: the caller's mask covers everything, or is None."""
    done = cached - history.input_ids.shape[1]
    mask = kwargs.get("attention_mask")
    rest = history.mask.new_ones(len(ids), done + ids.shape[1]) if mask is None else mask[:, history.length :].long()
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = (history.next + rest.cumsum(1) - 1)[..., -ids.shape[1] :]
    return {"attention_mask": torch.cat([history.mask, rest], 1), "position_ids": positions}


def _ends_alike(logical: PromptMap, count: int) -> bool:
    """Whether the last tokens of the short prompt are the last ones of the full prompt."""
    length = logical.selected.shape[1]
    last = torch.arange(length - count, length, device=logical.order.device)
    return count <= logical.order.shape[1] and bool((logical.order[:, -count:] == last).all())


def _refuse_modes(self: "Attachment", config: Any, kwargs: dict[str, Any]) -> None:
    """Ways of generating that cannot give what the plain model would, told before anything runs.

    Raises:
        UserError: one of them is asked for, and cannot be right.
    """

    def asked(name: str) -> Any:
        return kwargs.get(name, getattr(config, name, None))

    if asked("prefill_chunk_size") and self.family.looks_ahead:
        raise UserError(
            f"tokens of '{self.family.name}' see some that come behind them, and chunks of the prompt hide these; "
            "leave out prefill_chunk_size"
        )
    if self.digesting is not None and asked("prefill_chunk_size"):
        raise UserError("learned tokens stand in a prompt that arrives whole; leave out prefill_chunk_size")
    if self.inside is None and self.recalling is None:
        return
    if asked("prefill_chunk_size"):
        raise UserError(
            "a reducer inside the language model ranks by the end of the prompt, which the first chunks do not have; "
            "leave out prefill_chunk_size"
        )
    if "cache" not in self.sites:
        return
    if asked("use_cache") is False:
        raise UserError("a reducer at the cache has nothing to act on with use_cache=False")
    if asked("prompt_lookup_num_tokens") or kwargs.get("assistant_model") is not None:
        raise UserError(
            "a reducer at the cache acts after the prompt, but assisted decoding checks its first guesses together "
            "with the prompt; leave out the assistant"
        )


def _restored(logits: Tensor, logical: PromptMap) -> Tensor:
    """Logits ``[B, L, V]`` of the full prompt from those of the short one; zero at dropped tokens."""
    if logits.shape[1] == logical.selected.shape[1]:
        return logits
    full = logits.new_zeros(*logical.selected.shape, logits.shape[-1])
    index = logical.order[..., None].expand_as(logits)
    return full.scatter(1, index, logits * logical.valid[..., None])


def _guessed_mask(model: Any, ids: Tensor) -> Tensor:
    """The mask that ``generate`` assumes when none is given: padding, where the pad token means nothing else."""
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    pad = config.pad_token_id
    return torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()


def _count_lengths(config: Any, kwargs: dict[str, Any], dropped: int) -> None:
    """Translate lengths of prompt plus answer, which the caller counts with the dropped tokens."""
    for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = kwargs.get(name, getattr(config, name, None))
        if value and kwargs.get(instead, getattr(config, instead, None)) is None:
            kwargs[name] = max(value - dropped, 0)


def _with_padding(short: dict[str, Any]) -> dict[str, Any]:
    """One column of padding: ``generate`` drops a mask of ones, and gaps without mask and cache read as packing."""
    return short | {name: torch.nn.functional.pad(short[name], (1, 0)) for name in PROMPT if name in short}
