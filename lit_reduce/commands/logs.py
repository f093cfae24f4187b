"""Keeping stderr for the messages of this library."""


def quiet_transformers() -> None:
    """Turn off notices and loading bars of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
