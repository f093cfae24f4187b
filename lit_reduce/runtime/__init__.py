"""How a reduction happens inside a transformers model: encode, reduce, shorten, run; `attach` does all in one line."""

from lit_reduce.runtime.attach import Attachment, attach
from lit_reduce.runtime.attention.probe import AttentionProbe
from lit_reduce.runtime.compact import reduce_images, shorten
from lit_reduce.runtime.decoder.run import run_decoder
from lit_reduce.runtime.encode import Encoded, encode
from lit_reduce.runtime.prompt_map import PromptMap
from lit_reduce.runtime.session import Session
from lit_reduce.runtime.site import Stats

__all__ = [
    "Attachment",
    "AttentionProbe",
    "Encoded",
    "PromptMap",
    "Session",
    "Stats",
    "attach",
    "encode",
    "reduce_images",
    "run_decoder",
    "shorten",
]  # fmt: skip
