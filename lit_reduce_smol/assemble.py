"""One LLaVA of the two parts: its configuration, its weights, its processor.

The tower's hidden states 8 and 11 of 12 stand side by side (768 channels, ``vision_feature_layer=[8, 11]``): tuning for
saliency has hurt the last one. The placeholder ``<image>`` takes the place of a token that SmolLM2 keeps for notebooks,
so the vocabulary stays as it is. Pictures are resized to a square, not cropped.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce_smol.parts import LANGUAGE, TOWER, folder_of
from lit_reduce_smol.projector import folded
from lit_reduce_smol.reader import fold

SIDE = 224
LAYERS = (8, 11)
TRAINED = "trained.safetensors"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE, UNUSED = "<image>", "<empty_output>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load(folder: Path | None = None) -> tuple[Any, Any]:
    """The backbone ``smol``, float32 on the CPU, and its processor.

    Args:
        folder: What was trained (``trained.safetensors``); by default ``checkpoints/smol`` of the checkout.

    Raises:
        UserError: A part or what was trained is missing.
    """
    weights = read_trained(folder or shipped())
    processor = make_processor()
    language, tower = load_parts()
    model = join(language, tower, processor.tokenizer.convert_tokens_to_ids(IMAGE))
    fold(model.model.language_model, weights)
    model.model.multi_modal_projector.load_state_dict(folded(weights))
    model.name_or_path = "smol"
    return model, processor


def read_trained(folder: Path) -> dict[str, Tensor]:
    """The trained tensors by name.

    Raises:
        UserError: The file is missing or torn.
    """
    path = folder / TRAINED
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}; run the recipe of smol first") from error


def shipped() -> Path:
    """The folder of what was trained and of plug-ins: beside the package when installed, else of the checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "checkpoints" / "smol"
    return inside if inside.is_dir() else package.parent / "checkpoints" / "smol"


def load_parts() -> tuple[Any, Any]:
    """The language model and the tower, float32, as they were published.

    Raises:
        UserError: see `lit_reduce_smol.parts.folder_of`.
    """
    from transformers import Dinov2Model, LlamaForCausalLM

    language = LlamaForCausalLM.from_pretrained(folder_of(LANGUAGE), dtype=torch.float32)
    tower = Dinov2Model.from_pretrained(folder_of(TOWER), dtype=torch.float32)
    return language, tower


def join(language: Any, tower: Any, image_id: int, side: int = SIDE, layers: tuple[int, ...] = LAYERS) -> Any:
    """A `LlavaForConditionalGeneration` of the two parts with an untrained projector.

    Args:
        language: A causal Llama.
        tower: A DINOv2.
        image_id: The token that stands for a visual token.
        side: Width and height of pictures in pixels; the position table is resampled to it.
        layers: Hidden states of the tower that the projector reads, side by side.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    patch = tower.config.patch_size
    vision = type(tower.config)(**{**tower.config.to_dict(), "image_size": side})
    config = LlavaConfig(
        vision_config=vision, text_config=language.config, image_token_id=image_id, vision_feature_layer=list(layers),
        vision_feature_select_strategy="default", image_seq_length=(side // patch) ** 2,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    weights = tower.state_dict()
    table = "embeddings.position_embeddings"
    weights[table] = resample(weights[table], side // patch)
    model.model.vision_tower.load_state_dict(weights)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.tie_weights()
    model.generation_config = language.generation_config
    return model.eval()


def resample(table: Tensor, size: int) -> Tensor:
    """A table of positions ``[1, 1 + n * n, D]`` (CLS first) at ``size`` x ``size`` patches, bicubic."""
    side = round((table.shape[1] - 1) ** 0.5)
    grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2).double()  # the same bits on every machine
    grid = nn.functional.interpolate(grid, size=(size, size), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], 1)


def make_processor(folder: Path | None = None, side: int = SIDE) -> Any:
    """The processor; ``folder`` holds the tokenizer of the language part."""
    from tokenizers import Tokenizer
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    text = ((folder or folder_of(LANGUAGE)) / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text.replace(f'"{UNUSED}"', f'"{IMAGE}"')), padding_side="left",
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>",
        extra_special_tokens={"image_token": IMAGE},
    )  # fmt: skip
    images = CLIPImageProcessor(size={"height": side, "width": side}, do_center_crop=False, resample=3,
                                image_mean=list(MEAN), image_std=list(STD))  # fmt: skip
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token=IMAGE, chat_template=TEMPLATE,
    )  # fmt: skip
