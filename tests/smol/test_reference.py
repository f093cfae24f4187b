import pytest
import torch

from lit_reduce.backbones import load_backbone
from lit_reduce.errors import UserError
from lit_reduce_smol import assemble, reference
from lit_reduce_smol.projector import Projector
from lit_reduce_smol.reader import Reader
from lit_reduce_smol.training import Training, save_trained


@pytest.fixture
def shipped(language, tower, tokenizer, tmp_path, monkeypatch):
    """Stand-ins in the place of the parts, and something trained."""
    monkeypatch.setenv("LIT_REDUCE_CACHE", str(tmp_path / "cache"))
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(assemble, "folder_of", lambda part: tmp_path)
    monkeypatch.setattr(assemble, "load_parts", lambda: (language, tower))
    training = Training(Reader(language, tokenizer), Projector(24, 24), (1.0, 1.0))
    save_trained(tmp_path / "trained", training, {})
    monkeypatch.setattr(reference, "shipped", lambda: tmp_path / "trained")
    return tmp_path


def test_made_once_and_loaded_by_the_library(shipped, monkeypatch):
    folder = reference.folder()
    backbone = load_backbone(str(folder), "float32", "cpu")
    assert (backbone.identity.id, backbone.identity.tokens) == ("smol", 256)
    model, _ = assemble.load(shipped / "trained")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(backbone.model.state_dict()[name], weight, atol=0, rtol=0)
    monkeypatch.setattr(reference, "load", None)  # the parts are not read again
    assert reference.folder() == folder


def test_killed_while_it_was_written(shipped, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.LlavaProcessor.save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            reference.folder()
    assert not list((shipped / "cache").rglob("*.safetensors"))
    assert (reference.folder() / "model.safetensors").is_file()


def test_no_space(shipped, monkeypatch):
    monkeypatch.setattr(reference, "SIZE", 1 << 60)
    with pytest.raises(UserError, match="MiB are needed"):
        reference.folder()


def test_nothing_shipped(shipped, monkeypatch):
    monkeypatch.setattr(reference, "shipped", lambda: shipped / "nowhere")
    with pytest.raises(UserError, match="the weights of 'smol' are not here"):
        reference.folder()
