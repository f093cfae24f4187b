"""How thin a picture may be."""

from lit_reduce.errors import UserError

MAX_RATIO = 100
"""Of the longer side to the shorter. Processors scale the shorter side up to hundreds of pixels, the longer with it."""


def check_ratio(width: int, height: int) -> None:
    """Refuse a picture that a processor would blow up to gigabytes, or scale to nothing.

    Raises:
        UserError: A side is more than `MAX_RATIO` times as long as the other.
    """
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UserError(
            f"a picture of {width} x {height} is too thin: one side may be up to {MAX_RATIO} times the other"
        )
