import pytest

from lit_reduce.backbones import wrap
from lit_reduce_smol import quality
from lit_reduce_smol.assemble import IMAGE, join, make_processor
from lit_reduce_smol.cider import cider_d
from lit_reduce_smol.flickr import DESCRIBE, Flickr
from lit_reduce_smol.quality import QualitySettings, asked_of, caption_rows, measure, question_rows, table


@pytest.fixture
def backbone(language, tower, tokenizer, tmp_path):
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    processor = make_processor(tmp_path, side=56)
    return wrap(join(language, tower, processor.tokenizer.convert_tokens_to_ids(IMAGE), side=56), processor)


def answer(backbone, picture, prompt):
    inputs = backbone.prepare([picture], [prompt])
    return backbone.decode(backbone.model.generate(**inputs, do_sample=False, max_new_tokens=32), inputs)[0]


def test_captions_are_those_that_generate_gives(backbone, flickr8k):
    flickr = Flickr(flickr8k, held=4)
    rows, lines = caption_rows(backbone, flickr, "test", 4, batch=3)
    expected = [answer(backbone, flickr.open(i), DESCRIBE) for i in flickr.indices("test")]
    assert [line["said"] for line in lines] == expected
    assert rows["captions, CIDEr-D"]["count"] == 4
    references = [flickr.photos[i].captions for i in flickr.indices("test")]
    assert rows["captions, CIDEr-D"]["mean"] == pytest.approx(100 * float(cider_d(expected, references).mean()))


def test_rows_of_questions(backbone, flickr8k, monkeypatch):
    """`score` and `blind` have tests of their own, with pocket; here they find each "yes" right, and nothing."""
    flickr = Flickr(flickr8k, held=4)
    asked = list(asked_of(flickr, "test", 3))
    assert [group.open().size for group, _ in asked] == [(56, 56)] * 3
    assert all({right for _, right in group.turns} == {"yes", "no"} for group, _ in asked)

    def yes(_, asked):
        return {flickr.name: [float(right == "yes") for group, _ in asked for _, right in group.turns]}

    monkeypatch.setattr(quality, "score", yes)
    monkeypatch.setattr(quality, "blind", lambda _, asked, batch: [0.0] * sum(len(names) for _, names in asked))
    rows = question_rows(backbone, "match", flickr, "test", 3, batch=2)
    assert {name: (row["mean"], row["count"]) for name, row in rows.items()} == {
        "match, %": (50.0, 6), "match without the picture, %": (0.0, 6)
    }  # fmt: skip


def test_report_leaves_out_what_is_not_asked_for(backbone, flickr8k):
    chosen = QualitySettings(data=str(flickr8k.parent), photos=0, match=3, nlvr=0, easy=0)
    report = measure(backbone, chosen)
    assert list(report["rows"]) == ["match, %", "match without the picture, %"]
    assert len(table(report).splitlines()) == 4
