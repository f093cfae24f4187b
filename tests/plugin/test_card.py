"""The model card: a header that the hub's own parser accepts, and the numbers that were measured."""

import pytest
from huggingface_hub import ModelCard

from lit_reduce.plugin.card import metrics_table, model_card, short_id

CONFIG = {
    "reducer": "covipal",
    "backbone": {"id": "pocket", "hash": "ab" * 32, "family": "llava", "hidden_size": 8, "tokens": 576},
    "budgets": [192, 16],
    "positions": "keep",
    "library_version": "1.2.3",
    "metrics": {"accuracy": {"all": 0.98765, 64: [0.97, 0.96, 0.98], 192: 0.981}, "ttft_ms": {"64": 12.0}, "scenes": 9},
}


def card(**extra):
    return model_card(CONFIG, paper="A paper", parameters=1234, extra=extra)


def test_header_parses_and_says_what_the_hub_wants():
    data = ModelCard(card(license="mit", tags=["x"], datasets=["a/b"])).data.to_dict()
    assert data["library_name"] == "lit_reduce"
    assert (data["base_model"], data["base_model_relation"]) == ("pocket", "adapter")
    assert data["pipeline_tag"] == "image-text-to-text"
    assert (data["license"], data["datasets"]) == ("mit", ["a/b"])
    assert {"lit_reduce", "covipal", "x"} <= set(data["tags"])


def test_body_tells_backbone_budgets_numbers_and_how_to_load():
    text = card(notes="Made from a seed.")
    for part in [
        "ab" * 32,
        "192, 16 tokens",
        "1,234 parameters",
        "A paper",
        "predict.py backbone=pocket",
        "with attach(",
    ]:
        assert part in text
    assert text.endswith("Made from a seed.\n")
    assert "notes" not in ModelCard(text).data.to_dict()


def test_where_images_are_cut_into_tiles_the_card_says_so():
    tiled = CONFIG | {"backbone": CONFIG["backbone"] | {"tokens": 0}}
    text = model_card(tiled, "A paper", 1, {}, unit="tile of an image")
    assert "of an image's visual tokens, the more" in text
    assert "192, 16 tokens per tile of an image" in text
    assert "of an image's 576 visual tokens it" in card()
    assert "192, 16 tokens per image" in card()


@pytest.mark.parametrize(("budgets", "keep"), [([192, 16], 64), ([288, 576], 288), ([32, 8], 32), ([], 64)])
def test_the_example_keeps_what_was_trained(budgets, keep):
    text = model_card(CONFIG | {"budgets": budgets}, "A paper", 1, {})
    assert text.count(f"keep={keep} image") == text.count(f"keep={keep})") == 1


def test_metrics_table_has_a_row_per_budget_from_most_to_fewest():
    assert metrics_table(CONFIG["metrics"]).splitlines() == [
        "| tokens | accuracy | ttft_ms |",
        "|---:|---:|---:|",
        "| all | 0.9877 |  |",
        "| 192 | 0.981 |  |",
        "| 64 | 0.97 (0.96 to 0.98) | 12 |",
        "",
        "- scenes: 9",
    ]
    assert metrics_table({}) == "Nothing measured yet."


def test_paths_of_this_machine_stay_here(tmp_path, monkeypatch):
    assert short_id(str(tmp_path / "models" / "mine")) == "mine"
    assert short_id("./mine") == "mine"
    assert short_id("owner/name") == "owner/name"
    (tmp_path / "checkpoints" / "pocket").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert short_id("checkpoints/pocket") == "pocket"
