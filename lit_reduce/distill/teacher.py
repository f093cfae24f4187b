"""The teacher: the frozen backbone on all visual tokens; its outputs are cached on disk."""

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lit_reduce.backbones import Backbone
from lit_reduce.backbones.families import Family
from lit_reduce.data.groups import Group
from lit_reduce.files import write_atomic
from lit_reduce.plugin.checks import state_digest
from lit_reduce.runtime import encode
from lit_reduce.runtime.attention.probe import AttentionProbe
from lit_reduce.runtime.decoder.run import BESIDE, embed, run_decoder
from lit_reduce.runtime.encode import MEDIA, Encoded, encoder_keys, placeholders

TOP = 64  # log-probabilities stored for each answer token; the rest of the vocabulary is one bucket
LONGEST = 256  # tokens of the teacher's own answers; one that is longer is learned without an end
SIGNAL = "signal "  # before the name of a signal among the outputs
DIGEST = "sha256"  # the entry of a cache file's header with the digest of its tensors
PIXELS = "pixels"  # asked for like a signal: what the tower reads, where the reducer acts inside it
DEEPSTACK = "deepstack "  # before the number of a level of visual features that deeper layers read (Qwen3-VL)
TYPES = "types "  # before the name of an input with a type for each token of prefix and suffix
SIZES = "sizes "  # before the name of an input about the picture's size that positions depend on
Outputs = dict[str, Tensor]


class Teacher:
    """Runs the backbone once for all questions about a picture, or once for each where that would change the answers.

    Where `packs` allows it the turns share the picture: they lie one after another in a single sequence, under a mask
    that leaves each alone with the picture, so that a picture with sixteen questions costs little more than one with
    one.
    """

    def __init__(
        self,
        backbone: Backbone,
        layers: list[int],
        rows: str = "text",
        cache: Path | None = None,
        signals: Iterable[str] = (),
        stored: torch.dtype = torch.float16,
    ) -> None:
        """Prepare a teacher.

        Args:
            backbone: The frozen model.
            layers: Decoder layers whose text-to-image attention guides stage 1 (CoViPAL; which layers is our reading).
            rows: Whose attention counts: "text" (all tokens after the picture) or "answer".
            cache: Folder of the outputs, or None to compute them at every call.
            signals: Of the vision tower, which the reducer asks for; `PIXELS` for what the tower itself reads.
            stored: Number format of the outputs; bfloat16 takes its place where it overflows.
        """
        self.stored = stored
        asked = sorted(signals)
        self.backbone, self.layers, self.rows = backbone, layers, rows
        self.signals, self.pixels = [name for name in asked if name != PIXELS], PIXELS in asked
        facts = json.dumps([backbone.identity.hash, str(backbone.model.dtype), layers, rows, TOP, 2, *asked])
        self.cache = cache / hashlib.sha256(facts.encode()).hexdigest()[:16] if cache else None

    def outputs(self, group: Group) -> Outputs:
        """Returns the teacher's outputs for a group, from the cache when they are there.

        Returns:
            features [N, D]; grid [3]; prefix [P] (ids up to the picture's end); and for its n turns of S tokens in all:
            suffix [S], lengths [n, 2] (question and answer tokens), guide [n, N] (attention, sums to 1), top [A, 64]
            log-probabilities and their vocabulary ids top_ids [A, 64] for the A answer tokens; each signal; and what
            the tower reads, where that was asked for.
        """
        if self.cache is None:
            return self._compute(group)
        path = self.cache / f"{group.key}.safetensors"
        if (stored := read_outputs(path)) is not None:
            return stored
        found = {name: x.contiguous() for name, x in self._compute(group).items()}
        write_atomic(path, save(found, {DIGEST: state_digest(found)}))
        return found

    @torch.no_grad()
    def _compute(self, group: Group) -> Outputs:
        backbone = self.backbone
        model = backbone.model
        picture = group.open()
        first = backbone.prepare([picture], [group.turns[0][0]])
        encoded = encode(model, first, self.signals, backbone.family)
        features = encoded.features[0]
        prefix, questions = self._split(first, [prompt for prompt, _ in group.turns], picture)
        turns = [
            (asked, self._generated(picture, prompt) if answer is None else backbone.answer_ids(prompt, answer))
            for asked, (prompt, answer) in zip(questions, group.turns, strict=True)
        ]
        suffix = torch.tensor([t for q, a in turns for t in (*q, *a)], device=prefix.device)
        lengths = torch.tensor([(len(q), len(a)) for q, a in turns])
        sizes = {name: first[name] for name in encoder_keys(model) if name.endswith("_grid_thw") and name in first}
        types = token_types(model, backbone.family, prefix, suffix, lengths, first)
        if packs(model, backbone.family):
            logits, rows = self._packed(prefix, suffix, lengths, features)
        else:
            logits, rows = self._one_by_one(prefix, suffix, lengths, encoded, types, sizes)
        asked = answer_rows(lengths)
        values, ids = logits[asked].float().log_softmax(-1).topk(min(TOP, logits.shape[-1]))
        guide = self._guide(rows, prefix, lengths)
        out = {
            "features": self._short(features), "grid": torch.tensor(encoded.grids[0]), "prefix": prefix.int(),
            "suffix": suffix.int(), "lengths": lengths, "guide": self._short(guide),
            "top": self._short(values), "top_ids": ids.int(),
        }  # fmt: skip
        out |= {SIGNAL + name: self._short(encoded.signals[name][0]) for name in self.signals}
        out |= {f"{DEEPSTACK}{i}": self._short(level[0]) for i, level in enumerate(encoded.deepstack)}
        out |= {TYPES + name: x.int() for name, x in types.items()} | {SIZES + name: x for name, x in sizes.items()}
        for name in encoder_keys(model) if self.pixels else ():
            if first.get(name) is not None:
                out[f"{PIXELS} {name}"] = self._short(first[name])
        return {name: x.cpu() for name, x in out.items()}

    def _short(self, x: Tensor) -> Tensor:
        """Numbers in the format in which they are stored; indices as they are."""
        if not x.is_floating_point():
            return x
        made = x.to(self.stored)
        return made if made.isfinite().all() else x.bfloat16()

    def _split(self, first: dict[str, Any], prompts: list[str], picture: Any) -> tuple[Tensor, list[list[int]]]:
        """Returns the ids up to the end of the picture, and those after it for every prompt."""
        seen = placeholders(self.backbone.model, first["input_ids"])[0].nonzero()
        end = int(seen[-1]) + 1
        prefix = first["input_ids"][0, :end]
        known = first["input_ids"][0, end:].tolist()
        suffixes = [self.backbone.after_picture(prompt) for prompt in prompts]
        if suffixes[0] != known:  # a processor that writes more than the template says: ask it each time, slowly
            again = (self.backbone.prepare([picture], [prompt])["input_ids"][0] for prompt in prompts[1:])
            suffixes = [known, *(ids[end:].tolist() for ids in again)]
        return prefix, suffixes

    def _generated(self, picture: Any, prompt: str) -> list[int]:
        """The model's own answer; it has an end only where the model made one."""
        backbone = self.backbone
        inputs = backbone.prepare([picture], [prompt])
        visual = [getattr(backbone.model.config, f"{kind}_token_id", None) for kind in MEDIA]
        out = backbone.model.generate(
            **inputs, do_sample=False, max_new_tokens=LONGEST, suppress_tokens=[x for x in visual if x is not None]
        )
        end = backbone.answer_ids(prompt, "")[-1]
        known = backbone.model.generation_config.eos_token_id
        stops = {end, backbone.processor.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
        said: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
        length = next((i for i, token in enumerate(said) if token in stops), None)
        return said if length is None else [*said[:length], end]

    def _packed(self, prefix: Tensor, suffix: Tensor, lengths: Tensor, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        model, decoder = self.backbone.model, self.backbone.model.get_decoder()
        p, n = len(prefix), len(prefix) + len(suffix)
        turn = torch.repeat_interleave(torch.arange(len(lengths)), lengths.sum(1)).to(prefix.device)
        see = torch.ones(n, n, dtype=torch.bool, device=prefix.device).tril()
        see[p:, p:] &= turn[:, None] == turn
        embeds = embed(model, torch.cat([prefix, suffix])[None].long(), [features])
        mask = torch.zeros(n, n, dtype=embeds.dtype, device=prefix.device)
        mask = mask.masked_fill_(~see, torch.finfo(embeds.dtype).min)[None, None]
        within = torch.cat([torch.arange(int(k)) for k in lengths.sum(1)]).to(prefix.device)
        positions = torch.cat([torch.arange(p, device=prefix.device), p + within])[None]
        with ExitStack() as stack:
            rows = torch.arange(p, n, device=prefix.device)
            taps = [stack.enter_context(AttentionProbe(decoder.layers[i].self_attn, rows)) for i in self.layers]
            hidden = decoder(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
        logits: Tensor = model.get_output_embeddings()(hidden[0, p:])
        return logits, [tap.rows[0][0].mean(0) for tap in taps]

    def _one_by_one(
        self, prefix: Tensor, suffix: Tensor, lengths: Tensor, encoded: Encoded, types: Outputs, sizes: Outputs
    ) -> tuple[Tensor, list[Tensor]]:
        """As `_packed`, each turn in a pass of its own, with the model's own positions and masks."""
        model, p, start = self.backbone.model, len(prefix), 0
        layers = model.get_decoder().layers
        logits, rows = list[Tensor](), [list[Tensor]() for _ in self.layers]
        for count in lengths.sum(1).tolist():
            at = torch.cat([torch.arange(p), p + torch.arange(start, start + count)]).to(prefix.device)
            start += count
            ids = torch.cat([prefix, suffix])[at][None].long()
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **sizes}
            inputs |= {name: x[at][None] for name, x in types.items()}
            with ExitStack() as stack:
                taps = [stack.enter_context(AttentionProbe(layers[i].self_attn, slice(p, None))) for i in self.layers]
                found = run_decoder(model, inputs, encoded.features, deepstack=encoded.deepstack)
            logits.append(found[0, p:])
            for own, tap in zip(rows, taps, strict=True):
                own.append(tap.rows[0][0].mean(0)[:, :p])
        return torch.cat(logits), [torch.cat(own) for own in rows]

    def _guide(self, rows: list[Tensor], prefix: Tensor, lengths: Tensor) -> Tensor:
        """Returns the mean attention of each turn on every image token, [n, N], each row summing to 1."""
        image = placeholders(self.backbone.model, prefix)
        mean = torch.stack(rows).mean(0)[:, : len(prefix)][:, image]
        asked = answer_rows(lengths).to(mean.device)
        turn = torch.repeat_interleave(torch.arange(len(lengths)), lengths.sum(1)).to(mean.device)
        if self.rows == "answer":
            turn, mean = turn[asked], mean[asked]
        sums = torch.zeros(len(lengths), mean.shape[1], device=mean.device).index_add_(0, turn, mean)
        return sums / sums.sum(1, keepdim=True).clamp_min(1e-9)


def read_outputs(path: Path) -> Outputs | None:
    """The outputs in a file of the cache; None where there is none, or it is damaged and must be made again."""
    try:
        data = path.read_bytes()
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        outputs = load(data)
        return outputs if head["__metadata__"][DIGEST] == state_digest(outputs) else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def packs(model: Any, family: Family) -> bool:
    """Whether several questions may stand behind one picture: counted positions, causal, no sliding window."""
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None) and "sliding_attention" in (getattr(text, "layer_types", None) or ())
    return not (hasattr(model.base_model, "rope_deltas") or family.looks_ahead or window)


def token_types(
    model: Any, family: Family, prefix: Tensor, suffix: Tensor, lengths: Tensor, first: dict[str, Any]
) -> Outputs:
    """Types of all tokens of prefix and suffix, by the names of the inputs that the processor makes for this model.

    Visual tokens are 1 and text is 0. Where all tokens of the prompt see each other (PaliGemma), the prompt is 0 and
    the answer 1.
    """
    visual = placeholders(model, torch.cat([prefix, suffix]))
    answer = torch.cat([torch.arange(int(q + a)) >= q for q, a in lengths]).to(prefix.device)
    answer = torch.cat([torch.zeros_like(prefix, dtype=torch.bool), answer])
    whole = family.looks_ahead and not bool(first.get("token_type_ids", prefix.new_zeros(1)).any())
    return {name: (answer if whole else visual).long() for name in BESIDE if first.get(name) is not None}


def answer_rows(lengths: Tensor) -> Tensor:
    """Indices, within the turns laid end to end, of the tokens that predict an answer token."""
    out, at = [], 0
    for question, answer in lengths.tolist():
        out.append(torch.arange(at + question - 1, at + question + answer - 1))
        at += question + answer
    return torch.cat(out)
