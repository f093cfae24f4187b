import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image

from lit_reduce.errors import UserError
from lit_reduce_smol import states as module
from lit_reduce_smol.states import States, look, pixels


def picture(i):
    return Image.new("RGB", (56, 56), (i * 20, 5, 7))


def see(values):
    return values[:, :1, :2, :2].reshape(-1, 4, 1)


def test_killed_and_started_again_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 3)
    calls = []

    def opens(i):
        calls.append(i)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return picture(i)

    with pytest.raises(KeyboardInterrupt):
        States(tmp_path, "some", 10, 4, 1, write=True).fill(see, opens, range(10), batch=1)
    again = States(tmp_path, "some", 10, 4, 1, write=True)
    assert again.done.tolist() == [1] * 6 + [0] * 4
    again.fill(see, opens, range(10), batch=1)
    assert calls[8:] == [6, 7, 8, 9]
    expected = torch.stack([see(pixels(picture(i))[None])[0] for i in range(10)])
    torch.testing.assert_close(States(tmp_path, "some", 10, 4, 1)[range(10)], expected, atol=2e-3, rtol=1e-3)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="run the stage 'states' first"):
        States(tmp_path, "some", 3, 4, 1)
    States(tmp_path, "some", 3, 4, 1, write=True)
    with pytest.raises(UserError, match="holds other pictures"):
        States(tmp_path, "some", 4, 4, 1)


def test_no_space(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left"):
        States(tmp_path, "some", 3, 4, 1, write=True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert States(tmp_path, "some", 3, 4, 1, write=True).done.tolist() == [0, 0, 0]


def test_two_layers_side_by_side_without_cls(tower):
    values = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    hidden = tower(values, output_hidden_states=True).hidden_states
    found = look(tower, values)
    assert found.shape == (2, 16, 24)
    torch.testing.assert_close(found[..., :12], hidden[8][:, 1:])
    torch.testing.assert_close(found[..., 12:], hidden[11][:, 1:])


def test_pixels_of_a_grey_picture():
    grey = pixels(Image.fromarray(np.full((30, 60, 3), 124, np.uint8)), side=14)
    assert grey.shape == (3, 14, 14)
    assert grey[0].unique().tolist() == pytest.approx([(124 / 255 - 0.485) / 0.229], abs=1e-6)
