"""Backbones of every family with a real processor, small enough for a test: the models of `families`, made to talk.

One token is one character, so that a space before an answer is a token of its own. The chat templates are our own, with
the marks and the spaces of the published ones.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from families import FAMILIES, IMAGE, PAD, TEXT, TILES, VISION, build, initialise
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lit_reduce.backbones import Backbone, wrap

CHARACTERS = ["Ġ", "Ċ", *map(chr, range(33, 127))]
SPECIAL = ["<global-img>", "<image>", "<video>", "<boi>", "<eoi>", "<turn>", "<end>", "<fake>", "[INST]", "[/INST]"]
SIDE = {"height": 24, "width": 24}
SIZES = [(40, 24), (24, 40), (20, 20), (40, 24), (36, 44), (44, 16)]  # pictures as people have them: of any size


def _parts(image: str, text: str) -> str:
    return (
        "{% for p in m.content %}{% if p.type == 'image' %}" + image + "{% else %}" + text + "{% endif %}{% endfor %}"
    )


def _chat(before: str, image: str, end: str, reply: str, text: str = "{{ p.text }}", last: str = "") -> str:
    """Each turn as ``before``, its parts and ``end``; ``reply`` invites the answer, ``last`` stands behind it."""
    turns = "{% for m in messages %}" + before + _parts(image, text) + end + "{% endfor %}"
    return last + turns + "{% if add_generation_prompt %}" + reply + "{% endif %}"


LLAVA = _chat("{{ m.role.upper() }}: ", "<image>\n", "", "ASSISTANT:", "{{ p.text }} ")
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] " + _parts("<image>\n", "{{ p.text }}") + " [/INST]"
    "{% else %} {{ m.content[0].text }}</s> {% endif %}{% endfor %}"
)
CHATML = _chat("<turn>{{ m.role }}\n", "<image>", "<end>\n", "<turn>assistant\n")
SMOL = _chat(
    "{{ m.role.capitalize() }}{{ ':' if m.content[0].type == 'image' else ': ' }}", "<image>", "<end>\n", "Assistant:",
    last="<s>",
)  # fmt: skip
GEMMA = _chat(
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n", "<boi>", "<end>\n", "<turn>model\n",
    "{{ p.text | trim }}", last="<s>",
)  # fmt: skip
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST]" + _parts("<image>", "{{ p.text }}") + "[/INST]"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
ENDS = {  # what an answer of "red" becomes
    "llava": (" red", "</s>"), "llava_next": (" red", "</s>"), "llava_onevision": ("red", "<end>"),
    "qwen2_vl": ("red", "<end>"), "qwen2_5_vl": ("red", "<end>"), "qwen3_vl": ("red", "<end>"),
    "smolvlm": (" red", "<end>"), "idefics3": (" red", "<end>"), "internvl": ("red", "<end>"),
    "paligemma": ("red", "</s>"), "gemma3": ("red", "<end>"), "mistral3": ("red", "</s>"), "pixtral": ("red", "</s>"),
}  # fmt: skip


def tokenizer(**marks: str) -> Any:
    """Padding, begin and end of text, 96 characters, then `SPECIAL`; ``marks`` are tokens that a processor asks for."""
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", *CHARACTERS])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in ("<pad>", "<s>", "</s>", *SPECIAL)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        extra_special_tokens=marks,
    )  # fmt: skip


def _llava() -> Any:
    images = hf.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=SIDE)
    return hf.LlavaProcessor(
        images, tokenizer(image_token="<image>"), patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA,
    )  # fmt: skip


def _llava_next() -> Any:
    images = hf.LlavaNextImageProcessor(size={"shortest_edge": 24}, crop_size=SIDE, image_grid_pinpoints=TILES)
    return hf.LlavaNextProcessor(
        images, tokenizer(image_token="<image>"), patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=INST,
    )  # fmt: skip


def _llava_onevision() -> Any:
    images = hf.LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=TILES)
    return hf.LlavaOnevisionProcessor(
        images, tokenizer(image_token="<image>", video_token="<video>"), hf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=36, vision_feature_select_strategy="full", chat_template=CHATML,
    )  # fmt: skip


def _qwen(processor: Any, videos: Any) -> Any:
    images = hf.Qwen2VLImageProcessor(size={"shortest_edge": 64, "longest_edge": 2400}, patch_size=4, merge_size=2)
    marks = {"image_token": "<image>", "video_token": "<video>"}
    marks |= {"vision_bos_token": "<boi>", "vision_eos_token": "<eoi>"}
    template = CHATML.replace("<image>", "<boi><image><eoi>")
    return processor(images, tokenizer(**marks), videos(), chat_template=template)


def _idefics3() -> Any:
    images = hf.Idefics3ImageProcessor(size={"longest_edge": 48}, max_image_size={"longest_edge": 24})
    marks = {"image_token": "<image>", "fake_image_token": "<fake>", "global_image_token": "<global-img>"}
    made = hf.Idefics3Processor(images, tokenizer(**marks), image_seq_len=9, chat_template=SMOL)
    made.fake_image_token, made.fake_image_token_id = "<fake>", made.tokenizer.convert_tokens_to_ids("<fake>")
    return made


def _internvl() -> Any:
    images = hf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=4)
    marks = {"start_image_token": "<boi>", "end_image_token": "<eoi>", "context_image_token": "<image>"}
    return hf.InternVLProcessor(
        images, tokenizer(**marks, video_token="<video>"), hf.InternVLVideoProcessor(size=SIDE), image_seq_length=9,
        chat_template=CHATML,
    )  # fmt: skip


def _paligemma() -> Any:
    images = hf.SiglipImageProcessor(size=SIDE)
    images.image_seq_length = 36
    return hf.PaliGemmaProcessor(images, tokenizer(image_token="<image>"))


def _gemma3() -> Any:
    images = hf.Gemma3ImageProcessor(size=SIDE)
    marks = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    return hf.Gemma3Processor(images, tokenizer(**marks), chat_template=GEMMA, image_seq_length=9)


def _pixtral(merge: int) -> Any:
    images = hf.PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 4 * merge, "width": 4 * merge})
    return hf.PixtralProcessor(
        images, tokenizer(), patch_size=4, spatial_merge_size=merge, chat_template=MISTRAL, image_token="<image>",
        image_break_token="<boi>", image_end_token="<eoi>",
    )  # fmt: skip


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": lambda: _qwen(hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor),
    "qwen2_5_vl": lambda: _qwen(hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor),
    "qwen3_vl": lambda: _qwen(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
    "smolvlm": _idefics3,  # whose own differs in videos alone
    "idefics3": _idefics3,
    "internvl": _internvl,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "mistral3": lambda: _pixtral(2),
    "pixtral": lambda: _pixtral(1),
}


def _pixtral_model() -> tuple[Any, dict[str, Any]]:
    vision = VISION | {"model_type": "pixtral", "num_hidden_layers": 3, "image_size": 32, "head_dim": 12}
    text = {"model_type": "mistral", **TEXT, "head_dim": 8, "sliding_window": None}
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config), {}


def backbone(name: str, attention: str = "sdpa") -> Backbone:
    """The tiny model of a family with its processor, frozen."""
    if name == "pixtral":
        torch.manual_seed(0)
        model, _ = _pixtral_model()
        initialise(model)
        model.set_attn_implementation(attention)
    else:
        model = build(name, attention).model
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return wrap(model, PROCESSORS[name]())


assert set(FAMILIES) | {"pixtral"} == set(PROCESSORS)
