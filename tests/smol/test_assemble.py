from importlib.util import find_spec

import pytest
import torch
from PIL import Image

from lit_reduce.backbones import wrap
from lit_reduce.errors import UserError
from lit_reduce_smol.assemble import IMAGE, join, load, make_processor, resample
from lit_reduce_smol.parts import LANGUAGE, TOWER, cache_dir
from lit_reduce_smol.projector import Projector, folded
from lit_reduce_smol.reader import Reader, fold
from lit_reduce_smol.states import look, pixels


def installed():
    """Whether the real parts are here: in the cache, or in installed packages that can be converted."""
    return all(
        (cache_dir() / f"{part.name}-{part.sha256[:8]}").is_dir()
        or all(find_spec(name) for name in (part.module, *part.needs))
        for part in (LANGUAGE, TOWER)
    )


@pytest.fixture
def processor(tmp_path, tokenizer):
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    return make_processor(tmp_path, side=56)


def test_joined_model_answers_as_its_parts(language, tower, processor, tokenizer):
    """Tower, folded projector and folded updates in `generate` against the pieces of the training code."""
    g = torch.Generator().manual_seed(4)
    projector, reader = Projector(24, 24), Reader(language, tokenizer)
    for weight in reader.parameters():
        weight.data = torch.randn(weight.shape, generator=g) * 0.1
    picture = Image.new("RGB", (80, 40), (200, 30, 60))
    states = look(tower, pixels(picture, 56)[None])
    projector.standardise(states + torch.randn(states.shape, generator=g))
    trained = {**reader.state_dict(), **{f"projector.{k}": x for k, x in projector.state_dict().items()}}
    model = join(language, tower, processor.tokenizer.convert_tokens_to_ids(IMAGE), side=56)
    fold(model.model.language_model, trained)
    model.model.multi_modal_projector.load_state_dict(folded(trained))
    backbone = wrap(model, processor)
    inputs = backbone.prepare([picture], ["what ?"])
    visual = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    torch.testing.assert_close(visual, projector(states)[0], atol=1e-4, rtol=1e-4)
    fold(language.model, reader.state_dict())
    table = language.model.embed_tokens
    before = tokenizer("<|im_start|>user\n", add_special_tokens=False).input_ids
    after = tokenizer("\nwhat ?<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).input_ids
    x = torch.cat([table(torch.tensor(before)), visual, table(torch.tensor(after))])[None]
    torch.testing.assert_close(model(**inputs).logits[0, -1], language(inputs_embeds=x).logits[0, -1],
                               atol=1e-4, rtol=1e-4)  # fmt: skip
    assert backbone.identity.tokens == 16
    assert backbone.identity.vision_hidden_size == 24


def test_positions_stay_at_their_own_size():
    table = torch.randn(1, 17, 3)
    torch.testing.assert_close(resample(table, 4), table)
    assert resample(table, 2).shape == (1, 5, 3)


def test_without_trained_weights(tmp_path):
    with pytest.raises(UserError, match="run the recipe of smol first"):
        load(tmp_path)


@pytest.mark.skipif(not installed(), reason="the packages of the extra 'smol' are not installed")
def test_real_parts(tmp_path):
    """The real parts give an English sentence without, and 256 visual tokens with, a picture."""
    from lit_reduce_smol.assemble import load_parts

    processor = make_processor()
    language, tower = load_parts()
    assert sum(x.numel() for x in language.parameters()) == 134_515_008
    backbone = wrap(join(language, tower, processor.tokenizer.convert_tokens_to_ids(IMAGE)), processor)
    inputs = backbone.prepare([None], ["What is the capital of France?"])
    said = backbone.decode(backbone.model.generate(**inputs, do_sample=False, max_new_tokens=12), inputs)[0]
    assert "Paris" in said
    inputs = backbone.prepare([Image.new("RGB", (300, 200))], ["What is it?"])
    assert int((inputs["input_ids"] == backbone.model.config.image_token_id).sum()) == 256
    assert backbone.model(**inputs).logits.isfinite().all()
