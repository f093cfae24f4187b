"""How a reduction happens inside a transformers model: encode, compact, run; attach does all three in one line."""

from lit_reduce.runtime.attach import Attachment, Stats, attach
from lit_reduce.runtime.compact import Logical, compact
from lit_reduce.runtime.decoder import run_decoder
from lit_reduce.runtime.encode import Encoded, encode
from lit_reduce.runtime.taps import Tap

__all__ = [
    "Attachment", "Encoded", "Logical", "Stats", "Tap", "attach", "compact", "encode", "run_decoder",
]  # fmt: skip
