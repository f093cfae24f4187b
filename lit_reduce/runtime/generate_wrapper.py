"""``generate`` and ``forward`` on a shortened prompt, with the counts of the original one.

Callers count in the tokens they passed: ``generate`` returns the full prompt before the answer and takes ``max_length``
in original tokens, which callbacks see, too; ``forward`` returns logits for every original token (zero where one was
dropped). Hidden states, attentions and caches are those of the short prompt.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_reduce.errors import UserError
from lit_reduce.runtime.cache_compat import CACHE, cache_in, cache_of
from lit_reduce.runtime.conversation import History, cached_length, history_of, joined, plain_history, tail_of
from lit_reduce.runtime.encode import encoder_keys, placeholders
from lit_reduce.runtime.original_tokens import OriginalTokens
from lit_reduce.runtime.positions import positions_behind
from lit_reduce.runtime.prompt_map import PromptMap
from lit_reduce.runtime.session import Session
from lit_reduce.runtime.site import Option

PROMPT = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
TIMES = "second_per_grid_ts"  # of videos: positions depend on it
Plain = Callable[..., Any]


def reduced_generate(
    session: Session, plain: Plain, inputs: Tensor | None = None, generation_config: Any = None, *args: Any,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """``generate`` of an attached model.

    Args:
        session: Its reducers.
        plain: The model's own ``generate``.
        inputs: As in ``generate``, with all that follows.
        generation_config: Likewise.
        args: Likewise.
        kwargs: Likewise.
    """
    kwargs |= dict(zip(list(inspect.signature(plain).parameters)[2:], args, strict=False))
    if inputs is not None:
        kwargs["input_ids"] = inputs
    cache = cache_in(kwargs)
    if not _takes_digest(session, kwargs, cache) and _lets_pass(session, kwargs, cache):
        return plain(None, generation_config, **kwargs)
    ids, option = kwargs["input_ids"], _option(session.model, generation_config, kwargs)
    prompt = {name: kwargs.pop(name) for name in {*PROMPT, TIMES, *encoder_keys(session.model)} & kwargs.keys()}
    if prompt.get("attention_mask") is None:
        prompt["attention_mask"] = _guessed_mask(option, ids)
    session.refuse(option)
    short, history = _short_prompt(session, prompt, cache)
    _count_lengths(option, kwargs, ids.shape[1] - short["input_ids"].shape[1])
    padded = option("use_cache") is False
    short = _with_padding(short) if padded else short
    original = OriginalTokens(ids, short["input_ids"].shape[1])
    kwargs |= original.arguments(option, kwargs)
    with (
        session.reading(padded, original.length - cached_length(cache)),
        original.counting(session.model),
    ):
        out = plain(None, generation_config, **short, **kwargs)
    sequences = out if isinstance(out, Tensor) else out.sequences
    times = len(sequences) // len(ids)
    full = original.restore(sequences)
    cache = cache if isinstance(out, Tensor) else getattr(out, CACHE, cache)
    if cache is not None:
        history.repeat(times).write(cache)
    if isinstance(out, Tensor):
        return full
    out.sequences = full
    return out


def reduced_forward(session: Session, plain: Plain, *args: Any, **kwargs: Any) -> Any:
    """``forward`` of an attached model: for training, and for decoding loops written by hand.

    Args:
        session: Its reducers.
        plain: The model's own ``forward``.
        args: As in ``forward``.
        kwargs: Likewise.
    """
    kwargs |= dict(zip(inspect.signature(plain).parameters, args, strict=False))
    cache = cache_in(kwargs)
    if not _takes_digest(session, kwargs, cache) and _lets_pass(session, kwargs, cache):
        return plain(**kwargs)
    ids, mask, history = kwargs["input_ids"], kwargs.get("attention_mask"), history_of(cache)
    if cached_length(cache):
        if history is None or session.family.kinds(kwargs):
            raise UserError("forward cannot take a new image on a cache; use generate with the whole conversation")
        return plain(**kwargs | _step(history, cached_length(cache), ids, kwargs))
    if mask is None and _packed(kwargs.get("position_ids")):
        raise UserError(
            "position_ids that begin anew pack several samples into a row, which an attached model cannot tell apart; "
            "pass one sample in a row, with an attention_mask"
        )
    kwargs["attention_mask"] = mask = torch.ones_like(ids) if mask is None else mask
    wanted, at = kwargs.pop("return_dict", None), kwargs.pop("logits_to_keep", 0)
    short, prompt_map = session.shorten(kwargs)
    few = isinstance(at, int) and at > 0 and _ends_alike(prompt_map, at)  # the short prompt's last ones are the same
    with session.reading():
        out = plain(**short, logits_to_keep=at if few else 0, return_dict=True)
    if not few:
        logits = _restored(out.logits, prompt_map)
        out.logits = logits[:, -at:] if isinstance(at, int) else logits[:, at]  # the slice -0: is the whole
    if (written := cache_of(out)) is not None:
        _history(session, ids, mask, short, prompt_map).write(written)
    return out.to_tuple() if wanted is False else out


def _option(model: Any, config: Any, kwargs: dict[str, Any]) -> Option:
    """The value of a generation option by its name: a keyword, or the config passed, or the model's own config."""

    def value(name: str) -> Any:
        if name in kwargs:
            return kwargs[name]
        passed = getattr(config, name, None)
        return getattr(model.generation_config, name, None) if passed is None else passed

    return value


def _takes_digest(session: Session, kwargs: dict[str, Any], cache: Any) -> bool:
    """Whether the caller gives a digest of the images; it is taken out of the arguments."""
    digest = kwargs.pop("digest", None)
    if digest is not None and cached_length(cache):
        raise UserError("a digest is for reducers such as voco and the first turn of a conversation; leave it out")
    session.use_digest(digest)
    return digest is not None


def _lets_pass(session: Session, kwargs: dict[str, Any], cache: Any) -> bool:
    """Whether this call holds nothing to reduce and continues nothing that was reduced."""
    ids = kwargs.get("input_ids")
    if any(output is not None for output in (kwargs.get("mm_encoder_outputs") or {}).values()):
        raise UserError("an attached model reduces images itself; pass pixel_values, not mm_encoder_outputs")
    if history_of(cache) is not None:
        return False
    if not session.family.kinds(kwargs):
        session.record(0, 0)
        return True
    if ids is None:
        raise UserError("an attached model needs input_ids beside pixel_values; inputs_embeds hide where images are")
    tokens = int(placeholders(session.model, ids).sum())
    counts = [picture.count for picture in session.family.pictures(session.model, kwargs)]
    if cached_length(cache) == 0 and sum(counts) == tokens and session.keeps_all(counts):
        session.record(tokens, tokens)
        return True
    return False


def _short_prompt(session: Session, prompt: dict[str, Any], cache: Any) -> tuple[dict[str, Any], History]:
    """The inputs of one call of ``generate``, and the history that it leaves on its cache."""
    ids, mask, cached = prompt["input_ids"], prompt["attention_mask"], cached_length(cache)
    model = session.model
    if cached == 0:
        short, prompt_map = session.shorten(prompt)
        return short, _history(session, ids, mask, short, prompt_map)
    deltas = getattr(model.base_model, "rope_deltas", None)
    if hasattr(model.base_model, "rope_deltas") and not bool(placeholders(model, ids[:, :cached]).any()):
        deltas = torch.zeros_like(ids[:, :1])  # what the model noted may be of another call
    history = history_of(cache) or plain_history(ids, mask, cached, deltas)
    tail = tail_of(history, cached, ids, mask)
    done = tail.generated.shape[1]
    short = {"input_ids": tail.fresh, "attention_mask": tail.mask[:, done:], "position_ids": tail.positions[..., done:]}
    positions, seen = short["position_ids"], short["attention_mask"]
    if session.family.kinds(prompt) and bool(placeholders(model, tail.fresh).any()):
        session.refuse_behind_cache()
        pictures = {name: prompt[name] for name in {TIMES, *encoder_keys(model)} & prompt.keys()}
        if positions.ndim == 3:
            positions = positions_behind(model, positions, short | pictures)
        short, _ = session.shorten(short | pictures | {"position_ids": positions})
        if session.positions == "renumber":
            before = history.next + tail.mask[:, :done].sum(1, keepdim=True)
            short["position_ids"] = positions = short["position_ids"] + before
            seen = short["attention_mask"]
    else:  # images of earlier turns are in the cache; whoever passes them again means the same
        session.record(0, 0)
    whole = joined(history, tail, short)
    return whole, History.after(ids, whole, positions, seen)


def _history(session: Session, ids: Tensor, mask: Tensor, short: dict[str, Any], prompt_map: PromptMap) -> History:
    if session.positions == "renumber":
        return History.after(ids, short, short["position_ids"], prompt_map.valid)
    return History.after(ids, short, prompt_map.positions, mask)


def _step(history: History, cached: int, ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Mask and positions of new tokens behind a shortened prompt: the caller's mask covers everything, or is None."""
    done = cached - history.input_ids.shape[1]
    mask = kwargs.get("attention_mask")
    rest = history.mask.new_ones(len(ids), done + ids.shape[1]) if mask is None else mask[:, history.length :].long()
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = (history.next + rest.cumsum(1) - 1)[..., -ids.shape[1] :]
    return {"attention_mask": torch.cat([history.mask, rest], 1), "position_ids": positions}


def _packed(positions: Tensor | None) -> bool:
    """Whether position ids ``[B, L]`` or ``[R, B, L]`` begin anew within a row."""
    if positions is None:
        return False
    text = positions if positions.ndim == 2 else positions[0]
    return bool(((text[:, 1:] == 0) & (text[:, :-1] > 0)).any())


def _ends_alike(prompt_map: PromptMap, count: int) -> bool:
    """Whether the last tokens of the short prompt are the last ones of the full prompt."""
    length = prompt_map.selected.shape[1]
    last = torch.arange(length - count, length, device=prompt_map.order.device)
    return count <= prompt_map.order.shape[1] and bool((prompt_map.order[:, -count:] == last).all())


def _restored(logits: Tensor, prompt_map: PromptMap) -> Tensor:
    """Logits ``[B, L, V]`` of the full prompt from those of the short one; zero at dropped tokens."""
    if logits.shape[1] == prompt_map.selected.shape[1]:
        return logits
    full = logits.new_zeros(*prompt_map.selected.shape, logits.shape[-1])
    index = prompt_map.order[..., None].expand_as(logits)
    return full.scatter(1, index, logits * prompt_map.valid[..., None])


def _guessed_mask(option: Option, ids: Tensor) -> Tensor:
    """The mask that ``generate`` assumes when none is given: padding, where the pad token means nothing else."""
    ends, pad = option("eos_token_id"), option("pad_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()


def _count_lengths(option: Option, kwargs: dict[str, Any], dropped: int) -> None:
    """Translate lengths of prompt plus answer, which the caller counts with the dropped tokens."""
    for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = option(name)
        if value and option(instead) is None:
            kwargs[name] = max(value - dropped, 0)


def _with_padding(short: dict[str, Any]) -> dict[str, Any]:
    """One column of padding: ``generate`` drops a mask of ones, and gaps without mask and cache read as packing."""
    return short | {name: torch.nn.functional.pad(short[name], (1, 0)) for name in PROMPT if name in short}
