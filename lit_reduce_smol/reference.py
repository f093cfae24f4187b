"""smol as a reference: what the entry point ``smol = "lit_reduce_smol.reference:SMOL"`` announces."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError

from lit_reduce.errors import UserError
from lit_reduce.files import atomic_folder
from lit_reduce.registry import Reference
from lit_reduce_smol.assemble import TRAINED, load, shipped
from lit_reduce_smol.parts import cache_dir, check_space, clear

SIZE = 650_000_000


def folder() -> Path:
    """The whole model in the Hugging Face format, in the user's cache; assembled there at the first call.

    The cache has one folder for each state of what was trained. Neither the packages of the parts nor a network are
    needed once it is there.

    Raises:
        UserError: see `lit_reduce_smol.assemble.load`; or the cache cannot be written.
    """
    trained = shipped()
    if not (trained / TRAINED).is_file():
        raise UserError(f"the weights of 'smol' are not here: run from a checkout, which holds {trained / TRAINED}")
    place = cache_dir() / hashlib.sha256((trained / TRAINED).read_bytes()).hexdigest()[:8] / "smol"
    if (place / "config.json").is_file():
        return place
    model, processor = load(trained)
    clear(place)
    check_space(place, SIZE)
    try:
        with atomic_folder(place) as temporary:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
    except SafetensorError as error:  # how a full disk shows in its writer
        raise UserError(f"cannot write {place}: {' '.join(str(error).split())}; free some space") from error
    return place


SMOL = Reference("smol", folder, plugins=shipped())
