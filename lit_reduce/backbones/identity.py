"""Which backbone is this? A plug-in is trained for one set of weights, so the weights get a fingerprint."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lit_reduce.backbones.families import family_of
from lit_reduce.plugin import BackboneId

HEAD = 1 << 15  # values read at either end of a tensor: a fine-tuned model differs there too, and a 14 GB one is quick
SAMPLES = 512  # values compared between memory and disk, evenly spread over a tensor
ROUNDING = 2.0**-7  # relative: what loading in a format of 8 significant bits, and casting on from there, may change
_KNOWN: WeakKeyDictionary[nn.Module, tuple[str, BackboneId]] = WeakKeyDictionary()


def identify(model: Any) -> BackboneId:
    """The identity of a backbone; computed once for each model object, and anew when its weights have changed.

    The weights on disk are hashed where they are known (``model.name_or_path``) and those in memory are the same, so
    that neither the dtype of loading nor quantization changes the answer; otherwise those in memory are.

    Raises:
        UserError: the family is unknown.
    """
    state = {name: x for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    now = _sampled_digest(state)
    if model not in _KNOWN or _KNOWN[model][0] != now:
        config, family = model.config, family_of(model.config)
        layers, vision = getattr(config, "vision_feature_layer", -1), config.vision_config
        width = (
            getattr(vision, "embed_dim", None) or vision.hidden_size
        )  # Qwen2-VL calls its output's width hidden_size
        found = BackboneId(
            id=_name(model),
            hash=_hash(model, state),
            family=family.name,
            hidden_size=config.get_text_config().hidden_size,
            vision_hidden_size=width * (1 if isinstance(layers, int) else len(layers)),
            tokens=family.tokens(config),
            depth=config.get_text_config().num_hidden_layers,
        )
        _KNOWN[model] = now, found
    return _KNOWN[model][1]


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over shapes and sampled values, the same for one set of weights whatever the names and file layout.

    Values are compared in bfloat16, so the float32 and bfloat16 copies of a checkpoint are one backbone. Tensors are
    taken as a set: tied weights are stored once on disk and seen twice in memory.
    """
    marks = set()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        ends = torch.cat([flat[:HEAD], flat[HEAD:][-HEAD:]]).cpu()
        ends = ends.to(torch.bfloat16) if ends.is_floating_point() else ends.to(torch.int64)
        mark = hashlib.sha256(str(tuple(tensor.shape)).encode())
        mark.update(ends.contiguous().view(torch.uint8).numpy().tobytes())
        marks.add(mark.digest())
    return hashlib.sha256(b"".join(sorted(marks))).hexdigest()


def _hash(model: Any, state: Mapping[str, Tensor]) -> str:
    """The fingerprint of the weights on disk, if those in memory are theirs; else a digest of these by name."""
    stored = _on_disk(model)
    if stored is None:
        return fingerprint(state.values())
    samples: dict[str, tuple[torch.Size, Tensor]] = {}

    def sampled() -> Iterator[Tensor]:
        for name, tensor in stored:
            samples[name] = tensor.shape, _sample(tensor)
            yield tensor

    found = fingerprint(sampled())
    return found if _same(state, samples) else _sampled_digest(state)


def _same(state: Mapping[str, Tensor], stored: Mapping[str, tuple[torch.Size, Tensor]]) -> bool:
    """Whether each tensor in memory has the values of its namesake on disk, as far as rounding lets one say.

    Beginnings of names differ between releases of transformers, so the namesake is the tensor of that shape with most
    of the name's end in common. Tied, quantized and converted tensors may have none; they are not compared.
    """
    by_shape: dict[torch.Size, list[str]] = {}
    for name, (shape, _) in stored.items():
        by_shape.setdefault(shape, []).append(name)
    for name, tensor in state.items():
        parts = name.split(".")
        ranked = [(_alike(parts, other.split(".")), other) for other in by_shape.get(tensor.shape, ())]
        best = max((rank for rank, _ in ranked), default=(0, 0))
        if best[0] < 2 or not tensor.is_floating_point():
            continue
        mine = _sample(tensor)
        near = (stored[other][1] for rank, other in ranked if rank == best)
        if not any(torch.allclose(mine, each, rtol=ROUNDING, atol=1e-6, equal_nan=True) for each in near):
            return False
    return True


def _alike(name: Sequence[str], other: Sequence[str]) -> tuple[int, int]:
    """How many parts two names share at their ends, then anywhere."""
    end = 0
    for mine, theirs in zip(reversed(name), reversed(other), strict=False):
        if mine != theirs:
            break
        end += 1
    return end, len(set(name) & set(other))


def _sample(tensor: Tensor) -> Tensor:
    """Up to `SAMPLES` values, evenly spread from the first to the last, on the CPU."""
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, max(len(flat) - 1, 0), min(SAMPLES, len(flat)), dtype=torch.float64).long()
    return flat[places.to(flat.device)].cpu().float()


def _sampled_digest(state: Mapping[str, Tensor]) -> str:
    """Notices that weights have changed since the last look, without reading them all."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + _sample(tensor).numpy().tobytes())
    return digest.hexdigest()


def _on_disk(model: Any) -> Iterator[tuple[str, Tensor]] | None:
    """The tensors that transformers loads from the folder: those of the single file, or else those of the index."""
    folder = _folder(model)
    if folder is None:
        return None
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _tensors({single: None})
    if not index.is_file():
        return None
    files: dict[Path, list[str] | None] = {}
    for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
        files.setdefault(folder / file, []).append(name)  # type: ignore[union-attr]
    return _tensors(files)


def _tensors(files: Mapping[Path, list[str] | None]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of each file; None for all of them."""
    from safetensors import safe_open

    for path, names in files.items():
        with safe_open(path, framework="pt") as file:
            for name in file.keys() if names is None else names:
                yield name, file.get_tensor(name)


def _folder(model: Any) -> Path | None:
    """Where the weights came from: a local folder, or a snapshot that is already in the hub's cache."""
    name = getattr(model, "name_or_path", "")
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    revision = getattr(model.config, "_commit_hash", None)
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns="model*.safetensors", local_files_only=True)
    except Exception:  # noqa: BLE001  (not in the cache, not a hub id: the weights in memory serve)
        return None
    return Path(folder)


def _name(model: Any) -> str:
    name = str(getattr(model, "name_or_path", "") or "")
    return Path(name).resolve().name if Path(name).is_dir() else name or type(model).__name__
