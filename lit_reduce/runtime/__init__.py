"""How a reduction happens inside a transformers model: encode, compact, run; attach does all three in one line."""

from lit_reduce.runtime.attach import Attachment, Stats, attach
from lit_reduce.runtime.attention.probe import AttentionProbe
from lit_reduce.runtime.compact import PromptMap, compact
from lit_reduce.runtime.decoder.run import run_decoder
from lit_reduce.runtime.encode import Encoded, encode

__all__ = [
    "Attachment",
    "AttentionProbe",
    "Encoded",
    "PromptMap",
    "Stats",
    "attach",
    "compact",
    "encode",
    "run_decoder",
]  # fmt: skip
