"""Settings of ``predict``."""

from dataclasses import dataclass

from lit_reduce.options import option
from lit_reduce.settings.groups import AUTO, BackboneSettings, ReducerSettings, backbone, reducer


@dataclass
class PredictSettings:
    """Answer a question about a picture, or a JSON-lines file of questions.

    python predict.py image=a.png prompt="What colour is the circle?"
    python predict.py input=questions.jsonl output=answers.jsonl
    """

    backbone: BackboneSettings = backbone()
    reducer: ReducerSettings = reducer(AUTO, "what chooses the visual tokens; auto: the plug-in of the reference model")
    keep: int | float = option(64, "visual tokens that stay of each picture: a count (64) or a ratio (0.25)")
    max_new_tokens: int = option(32, "the longest answer, in tokens", min=1)
    image: str | None = option(None, "one question: the picture, in any usual format, up to 64 million pixels")
    prompt: str | None = option(None, "one question: what to ask about the picture")
    overlay: str | None = option(None, "one question: write the picture with the kept tokens painted on it here")
    json: bool = option(False, "true prints one JSON object instead of text; times in it are in milliseconds")
    runs: int = option(0, "timed runs with the reducer and without it, in turns; 0: no timing", min=0)
    input: str | None = option(
        None, "many questions: a JSON-lines file with image, prompt, and optional id and answer in each line"
    )
    output: str | None = option(
        None, "many questions: one JSON line for each row, in the same order; run again, a killed run continues"
    )
    batch_size: int = option(8, "many questions: how many at a time", min=1)
    on_error: str = option(
        "stop",
        "stop: all rows are checked before the start, and a picture that cannot be decoded ends the run; record: such "
        "a row gets an error in place of the answer",
        choices=("stop", "record"),
    )
