"""The benchmark: what it counts and measures, on a tiny shape, and what it refuses."""

import json

import pytest
import torch
from families import FAMILIES

from lit_reduce.backbones import load_backbone, shapes
from lit_reduce.benchmark import flops as cost
from lit_reduce.benchmark.bench import bench, named_spec
from lit_reduce.commands.bench import run
from lit_reduce.errors import UserError
from lit_reduce.inference.spec import ReducerSpec
from lit_reduce.reducer import create
from lit_reduce.settings import BackboneSettings, ReducerSettings
from lit_reduce.settings.bench import BenchSettings


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", lambda: FAMILIES["llava"]()[0].config)


def chosen(tmp_path=None, reducer="covipal", **options):
    given = {"batch": [2], "keep": [36, 9], "visual": 36, "text": 6, "new_tokens": 3, "runs": 2} | options
    if tmp_path is not None:
        given["out"] = str(tmp_path / "bench.json")
    backbone = BackboneSettings("shape:tiny", device="cpu")
    return BenchSettings(backbone=backbone, reducer=ReducerSettings(reducer), **given)


def test_the_report_holds_every_figure_and_the_table_every_row(tmp_path, capsys):
    run(chosen(tmp_path, batch=[1, 2]))
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["batch"], row["keep"]) for row in report["rows"]] == [
        (b, k) for b in (1, 2) for k in ("all", "36", "9")
    ]
    assert {"date", "device", "threads", "torch", "dtype", "attention", "weights_bytes"} <= report.keys()
    for row in report["rows"]:
        for name in ("first_token_ms", "prefill_ms", "decode_ms"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert row["prefill_ms"]["median"] < row["first_token_ms"]["median"]
        assert row["peak_bytes"] > 0
    plain, idle, few = report["rows"][3:]
    assert plain["reducer_ms"]["median"] == idle["reducer_ms"]["median"] == 0 < few["reducer_ms"]["median"]
    assert plain["flops"] == idle["flops"]
    assert few["flops"]["reducer"] > 0
    model = load_backbone("shape:tiny", device="cpu").model
    assert few["flops"]["prefill"] == cost.prefill_flops(model, [15] * 5, 2)
    assert few["prefill_flop_ratio"] == plain["flops"]["prefill"] / few["flops"]["prefill"]
    assert few["kv_bytes"] / plain["kv_bytes"] == 15 / 42
    out = capsys.readouterr().out
    assert sum(line.split()[1:2] == ["9"] for line in out.splitlines()) == 2
    assert (tmp_path / "bench.settings.yaml").is_file()


def test_a_killed_run_keeps_the_batch_sizes_that_are_done(tmp_path, monkeypatch):
    def until_two(*args):
        if args[3] == 2:
            raise KeyboardInterrupt
        return bench(*args)

    monkeypatch.setattr("lit_reduce.commands.bench.bench", until_two)
    with pytest.raises(KeyboardInterrupt):
        run(chosen(tmp_path, batch=[1, 2]))
    assert {row["batch"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]} == {1}


def tower_calls(backbone):
    calls = []
    backbone.model.get_encoder("image").register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_without_the_tower_it_is_neither_run_nor_priced():
    backbone, settings = load_backbone("shape:tiny", device="cpu"), chosen(tower=False)
    calls = tower_calls(backbone)
    plain, _, few = bench(backbone, named_spec(settings.reducer, backbone), [36, 9], 2, settings)
    assert not calls
    assert plain["flops"]["tower"] == plain["flops"]["projector"] == 0
    assert few["tokens"] == 9
    bench(backbone, ReducerSpec(), [], 1, chosen())
    assert len(calls) == 1 + 2  # and the next one has its tower back: one run to warm up, two counted


def test_real_pictures_are_encoded_once(tiny):
    calls = tower_calls(tiny)
    bench(tiny, ReducerSpec(create("grid")), [9], 1, chosen(visual=None, tower=False))
    assert len(calls) == 1


def test_a_reducer_that_looks_into_the_tower_needs_it():
    backbone = load_backbone("shape:tiny", device="cpu")
    with pytest.raises(UserError, match="tower=false: the reducer 'fastervlm' looks into the tower"):
        bench(backbone, ReducerSpec(create("fastervlm")), [9], 1, chosen(tower=False))


def test_a_trained_reducer_by_name_gets_the_width_of_the_backbone_and_the_same_weights_each_time():
    backbone = load_backbone("shape:tiny", device="cpu")
    one, two = (named_spec(ReducerSettings("covipal"), backbone).reducer for _ in range(2))
    assert one.config.hidden_size == 32
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runs": 0}, "runs=0: give 1 or more"),
        ({"batch": []}, r"batch=\[\]: give 1 value at least"),
        ({"batch": [0]}, r"batch=\[0\]: give .* each 1 or more"),
        ({"batch": ["two"]}, "batch=two is not a number of prompts"),
        ({"keep": [37]}, "an image has only 36 visual tokens"),
        ({"keep": ["many"]}, "keep='many' is not a number"),
        ({"visual": 35}, "visual=35: a picture has 36 tokens"),
        ({"clock": "sun"}, "clock=sun: use wall, cpu"),
        ({"out": "bench.txt"}, "ends in .json"),
        ({"reducer": "nobody"}, "unknown reducer 'nobody'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        run(chosen(**{"out": "bench.json"} | options))


def test_a_real_backbone_makes_its_own_visual_tokens(tiny):
    settings = chosen(visual=None, text=4)
    (row,) = bench(tiny, ReducerSpec(), [], 1, settings)
    assert row["tokens"] == 36
    with pytest.raises(UserError, match="visual=36 needs a shape: backbone"):
        bench(tiny, ReducerSpec(), [], 1, chosen())
