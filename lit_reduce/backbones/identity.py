"""Which backbone is this? A plug-in is trained for one set of weights, so the weights get a fingerprint."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lit_reduce.backbones.families import family_of
from lit_reduce.plugin import BackboneId

HEAD = 1 << 15  # values read at either end of a tensor: a fine-tuned model differs there too, and a 14 GB one is quick
_KNOWN: WeakKeyDictionary[nn.Module, BackboneId] = WeakKeyDictionary()


def identify(model: Any) -> BackboneId:
    """The identity of a backbone; computed once for each model object.

    The weights on disk are read where they are known (``model.name_or_path``), so that neither the dtype of loading nor
    quantization changes the answer; otherwise those in memory are.

    Raises:
        UserError: the family is unknown.
    """
    if model not in _KNOWN:
        config, family = model.config, family_of(model.config)
        layers, vision = getattr(config, "vision_feature_layer", -1), config.vision_config
        width = (
            getattr(vision, "embed_dim", None) or vision.hidden_size
        )  # Qwen2-VL calls its output's width hidden_size
        _KNOWN[model] = BackboneId(
            id=_name(model),
            hash=fingerprint(_on_disk(model) or model.state_dict().values()),
            family=family.name,
            hidden_size=config.get_text_config().hidden_size,
            vision_hidden_size=width * (1 if isinstance(layers, int) else len(layers)),
            tokens=family.tokens(config),
            depth=config.get_text_config().num_hidden_layers,
        )
    return _KNOWN[model]


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


def _on_disk(model: Any) -> Iterator[Tensor] | None:
    folder = _folder(model)
    if folder is None:
        return None
    files: dict[Path, list[str] | None] = dict.fromkeys(sorted(folder.glob("model*.safetensors")))
    index = folder / "model.safetensors.index.json"
    if index.is_file() and folder / "model.safetensors" not in files:  # transformers prefers the single file, too
        files = {}
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(folder / file, []).append(name)  # type: ignore[union-attr]
    return _tensors(files) if files else None


def _tensors(files: Mapping[Path, list[str] | None]) -> Iterator[Tensor]:
    """The named tensors of each file; None for all of them."""
    from safetensors import safe_open

    for path, names in files.items():
        with safe_open(path, framework="pt") as file:
            for name in file.keys() if names is None else names:
                yield file.get_tensor(name)


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
