"""Attach a training-free reducer to a Hugging Face model and compare its answer with the plain one.

Run ``python examples/attach_to_huggingface.py`` for a tiny random LLaVA, offline, or
``python examples/attach_to_huggingface.py llava-hf/llava-1.5-7b-hf a.png "What is on the left?"``.
"""

import sys
from typing import Any

from PIL import Image
from tiny_llava import model as tiny_model
from tiny_llava import processor as tiny_processor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lit_reduce import attach


def load(name: str | None) -> tuple[Any, Any]:
    """Model and processor of a hub id or folder; the tiny ones for None."""
    if name is None:
        return tiny_model(), tiny_processor()
    return LlavaForConditionalGeneration.from_pretrained(name), AutoProcessor.from_pretrained(name)


def answer(model: Any, processor: Any, image: Image.Image, question: str, reducer: str | None, keep: int) -> str:
    """Answer a question, with ``keep`` visual tokens where a reducer is named and with all of them otherwise."""
    prompt = f"USER: <image>\n{question} ASSISTANT:"
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device)
    if reducer is None:
        sequences = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    else:
        with attach(model, reducer, keep=keep) as attached:
            sequences = model.generate(**inputs, max_new_tokens=30, do_sample=False)
        print(f"{reducer}: {attached.stats.kept} of {attached.stats.total} visual tokens")
    return str(processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def main(words: list[str]) -> None:
    """Answer with all tokens and with a reduced image."""
    model, processor = load(words[0] if words else None)
    image = Image.open(words[1]).convert("RGB") if len(words) > 1 else Image.new("RGB", (48, 48), "red")
    question, keep = (words[2], 64) if len(words) > 2 else ("what is on the left ?", 9)
    print("all tokens:", answer(model, processor, image, question, None, keep))
    print("divprune:  ", answer(model, processor, image, question, "divprune", keep))


if __name__ == "__main__":
    main(sys.argv[1:])
