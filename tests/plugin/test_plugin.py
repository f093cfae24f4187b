"""Saving, loading and every refusal in between."""

import dataclasses
import hashlib
import json
import os
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

import lit_reduce.reducer as reducer_module
from lit_reduce.errors import UserError
from lit_reduce.plugin import (
    CARD,
    CONFIG,
    FILES,
    WEIGHTS,
    BackboneId,
    PluginConfig,
    load_plugin,
    save_plugin,
)  # fmt: skip
from lit_reduce.reducer import ReducerConfig, ScoringReducer, available, create, register
from lit_reduce.tokens import VisualTokens

BACKBONE = BackboneId("pocket", "0123456789abcdef" * 4, "llava", 8, 16, 24)


@dataclass
class LinearConfig(ReducerConfig):
    width: int = field(default=8, metadata={"help": "of the tokens"})
    tied: bool = False
    layers: int = 0


class Linear(ScoringReducer):
    name = "linear_toy"
    trained = True
    paper = "nobody's"
    config_class = LinearConfig

    def __init__(self, config=None):
        super().__init__(config)
        self.head = nn.Linear(self.config.width, 1)
        self.register_buffer("steps", torch.tensor(3))
        self.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(self.config.layers))
        if self.config.tied:
            self.twin = self.head

    def score(self, tokens):
        return self.head(tokens.features.to(self.head.weight.dtype))[..., 0]


@pytest.fixture(autouse=True)
def linear_toy(monkeypatch):
    available()
    monkeypatch.setattr(reducer_module, "_REGISTER", dict(reducer_module._REGISTER))
    register(Linear)


def plugin_config(**changes):
    return PluginConfig("linear_toy", {}, dataclasses.replace(BACKBONE), [192, 64], **changes)


@pytest.fixture
def saved(tmp_path):
    reducer = Linear(LinearConfig(width=8))
    reducer.steps.fill_(41)
    return save_plugin(tmp_path / "plug", reducer, plugin_config(metrics={"accuracy": {64: 0.5}})), reducer


def change(folder, **entries):
    """Edit the config as a hand or another version would."""
    raw = json.loads((folder / CONFIG).read_text())
    for key, value in entries.items():
        if value is None:
            raw.pop(key)
        else:
            raw[key] = value
    (folder / CONFIG).write_text(json.dumps(raw))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_save_load_gives_the_same_output_to_the_bit(tmp_path, dtype, tied):
    reducer = Linear(LinearConfig(width=8, tied=tied)).to(dtype)
    reducer.steps.fill_(41)
    save_plugin(tmp_path / "plug", reducer, plugin_config(positions="renumber"))
    loaded, config = load_plugin(tmp_path / "plug", backbone=BACKBONE)
    assert sorted(entry.name for entry in (tmp_path / "plug").iterdir()) == sorted(FILES)
    tokens = VisualTokens(torch.randn(2, 24, 8, dtype=dtype), (1, 4, 6))
    before, after = reducer(tokens, 5), loaded(tokens, 5)
    assert torch.equal(before.scores, after.scores)
    assert torch.equal(before.kept_indices, after.kept_indices)
    assert loaded.head.weight.dtype == dtype
    assert loaded.steps == 41
    assert not loaded.training
    assert loaded.config == reducer.config
    assert (config.reducer, config.options) == ("linear_toy", {"width": 8, "tied": tied, "layers": 0})
    assert (config.backbone, config.budgets, config.positions) == (BACKBONE, [192, 64], "renumber")


def test_saving_does_not_touch_the_reducer_and_a_loaded_one_can_train_on(saved):
    folder, reducer = saved
    assert reducer.training
    loaded, _ = load_plugin(folder)
    loaded.head(torch.ones(1, 8)).sum().backward()
    assert loaded.head.weight.grad is not None


def test_loading_leaves_the_callers_random_stream_alone(saved):
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    load_plugin(saved[0])
    assert torch.equal(torch.rand(2), expected)


def test_saving_again_replaces_the_three_files_and_keeps_the_rest(saved):
    folder, _ = saved
    (folder / "train.yaml").write_text("mine")
    save_plugin(folder, Linear(LinearConfig(width=4)), plugin_config())
    loaded, config = load_plugin(folder)
    assert loaded.config.width == 4
    assert config.metrics == {}
    assert (folder / "train.yaml").read_text() == "mine"


def test_config_file_is_sorted_plain_json_without_nan(tmp_path):
    folder = save_plugin(tmp_path / "p", Linear(), plugin_config(metrics={"kl": {"64": float("nan")}, "t": (1, 2)}))
    raw = json.loads((folder / CONFIG).read_text(), parse_constant=pytest.fail)
    assert list(raw) == sorted(raw)
    assert raw["metrics"] == {"kl": {"64": None}, "t": [1, 2]}


def test_unknown_entries_warn_and_drop(saved):
    folder, _ = saved
    options = {"width": 8, "tied": False, "future": 1}
    change(folder, novelty=3, options=options, backbone={**dataclasses.asdict(BACKBONE), "colour": "red"})
    with pytest.warns(UserWarning, match="ignoring unknown entries") as caught:
        _, config = load_plugin(folder)
    text = " ".join(str(warning.message) for warning in caught)
    assert all(name in text for name in ("novelty", "future", "colour"))
    assert config.backbone == BACKBONE


@pytest.mark.parametrize("key", ["reducer", "options", "backbone", "budgets", "positions", "format_version"])
def test_missing_entries_are_refused(saved, key):
    change(saved[0], **{key: None})
    with pytest.raises(UserError, match=f"missing {key}"):
        load_plugin(saved[0])


@pytest.mark.parametrize("key", [entry.name for entry in dataclasses.fields(BackboneId) if entry.name != "depth"])
def test_missing_entries_of_the_backbone_are_refused(saved, key):
    change(saved[0], backbone={k: v for k, v in dataclasses.asdict(BACKBONE).items() if k != key})
    with pytest.raises(UserError, match=f"missing {key}"):
        load_plugin(saved[0])


@pytest.mark.parametrize("key", ["metrics", "library_version", "weights_sha256"])
def test_entries_that_have_a_default_may_be_absent(saved, key):
    change(saved[0], **{key: None})
    load_plugin(saved[0])


def test_a_plugin_that_knows_no_depth_serves_any(saved):
    change(saved[0], backbone={k: v for k, v in dataclasses.asdict(BACKBONE).items() if k != "depth"})
    assert load_plugin(saved[0], backbone=dataclasses.replace(BACKBONE, depth=12))[1].backbone.depth == 0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"reducer": 3}, "'reducer' must be of type str, not 3"),
        ({"options": [1]}, "'options' must be of type dict"),
        ({"backbone": "pocket"}, "BackboneId must be an object"),
        ({"budgets": ["64"]}, "'budgets' must be of type list"),
        ({"budgets": 64}, "'budgets' must be of type list"),
        ({"format_version": True}, "'format_version' must be of type int"),
        ({"format_version": 99}, "has format 99.*upgrade lit_reduce"),
        ({"positions": "shuffle"}, "positions must be one of keep, renumber, not 'shuffle'"),
        ({"reducer": "linear_toi"}, "unknown reducer 'linear_toi'; did you mean 'linear_toy'"),
        ({"reducer": "os.system"}, "unknown reducer 'os.system'"),
        ({"options": {"width": "8"}}, "option 'width' must be of type int"),
        ({"options": {"width": 9}}, "do not fit together.*size mismatch for head.weight"),
        ({"options": {"width": -1}}, "do not fit together"),
        ({"options": {"width": 10**12}}, "do not fit together.*size mismatch"),
        ({"options": {"width": 2**62}}, "do not fit together"),
        ({"options": {"layers": 2_000_000_000}}, "more weights than there are"),
        ({"options": {"tied": True}}, "do not fit together.*Missing key"),
    ],
)
def test_wrong_entries_are_refused_in_one_line(saved, entries, message):
    change(saved[0], **entries)
    with pytest.raises(UserError, match=message) as caught:
        load_plugin(saved[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 4096}, "trained on pocket with hidden size 8, but other has 4096; train one for other"),
        ({"vision_hidden_size": 32}, "trained on pocket with vision hidden size 16, but other has 32"),
        (
            {"hash": "f" * 64},
            r"on pocket \(weights 0123456789ab\), but other has other weights \(ffffffffffff\)",
        ),
    ],
)
def test_a_foreign_backbone_is_refused_with_a_sentence(saved, changes, message):
    with pytest.raises(UserError, match=message):
        load_plugin(saved[0], backbone=dataclasses.replace(BACKBONE, id="other", **changes))


def test_a_renamed_copy_of_the_same_backbone_and_other_resolutions_are_welcome(saved):
    load_plugin(saved[0], backbone=dataclasses.replace(BACKBONE, id="copy", tokens=100))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_corrupt_config_is_refused(saved, content):
    (saved[0] / CONFIG).write_bytes(content)
    with pytest.raises(UserError, match=CONFIG):
        load_plugin(saved[0])


def spoil(data, how):
    if how == "cut":
        return data[:-3]
    if how == "flip":
        return data[:-1] + bytes([data[-1] ^ 1])
    if how == "pickle":
        return pickle.dumps({"head.weight": [1.0]})
    return b""


# Without the hash in the config, only a flipped bit would go unseen.
@pytest.mark.parametrize(
    ("how", "with_hash"),
    [
        ("cut", True),
        ("flip", True),
        ("pickle", True),
        ("empty", True),
        ("cut", False),
        ("pickle", False),
        ("empty", False),
    ],
)
def test_corrupt_weights_are_refused(saved, how, with_hash):
    folder, _ = saved
    if not with_hash:
        change(folder, weights_sha256=None)
    (folder / WEIGHTS).write_bytes(spoil((folder / WEIGHTS).read_bytes(), how))
    with pytest.raises(UserError, match=WEIGHTS):
        load_plugin(folder)


def test_files_of_two_saves_do_not_mix(saved, tmp_path):
    other = save_plugin(tmp_path / "other", Linear(), plugin_config())
    (saved[0] / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())
    with pytest.raises(UserError, match="is of another save"):
        load_plugin(saved[0])


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_refused(saved, name):
    (saved[0] / name).unlink()
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        load_plugin(saved[0])


def test_the_card_is_not_needed_to_load(saved):
    (saved[0] / CARD).unlink()
    load_plugin(saved[0])


@pytest.mark.parametrize(
    "place", ["./nowhere", "/no/where", "a/b/c", "nowhere", "", "~/no-such-plug-in", "https://x.y/z"]
)
def test_places_that_are_neither_folder_nor_hub_id(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "")
    with pytest.raises(UserError, match=r"no plug-in at|cannot be read"):
        load_plugin(place)


def test_a_file_and_a_revision_of_a_folder_are_refused(saved):
    with pytest.raises(UserError, match="is a file; give the folder"):
        load_plugin(saved[0] / WEIGHTS)
    with pytest.raises(UserError, match="revision=main is for the hub"):
        load_plugin(saved[0], revision="main")


def test_an_unwritable_folder_leaves_no_litter(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        save_plugin(tmp_path / "file" / "plug", Linear(), plugin_config())
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


BROKEN = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(saved, value, dtype):
    folder, reducer = saved
    reducer.to(dtype)
    with torch.no_grad():
        reducer.head.bias.fill_(value)
    before = {name: (folder / name).read_bytes() for name in FILES}
    with pytest.raises(UserError, match=r"head\.bias holds numbers that are not finite"):
        save_plugin(folder, reducer, plugin_config())
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    save_file({name: x.contiguous() for name, x in reducer.state_dict().items()}, folder / WEIGHTS)
    change(folder, weights_sha256="")
    with pytest.raises(UserError, match=r"head\.bias holds numbers that are not finite"):
        load_plugin(folder)


@dataclass
class SlopedConfig(LinearConfig):
    slopes: list[float] = field(default_factory=lambda: [1.0])


class Sloped(Linear):
    name = "sloped_toy"
    config_class = SlopedConfig


@pytest.mark.parametrize("value", BROKEN)
def test_options_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path, value):
    register(Sloped)
    folder = save_plugin(tmp_path / "good", Sloped(), plugin_config())
    with pytest.raises(UserError, match=r"slopes=.*give a finite number"):
        save_plugin(tmp_path / "bad", Sloped(SlopedConfig(slopes=[1.0, value])), plugin_config())
    assert not (tmp_path / "bad").exists()
    change(folder, options={"width": 8, "slopes": [1.0, value]})
    with pytest.raises(UserError, match=r"reducer_config.*slopes=.*give a finite number"):
        load_plugin(folder)
    with pytest.raises(UserError, match=r"slopes=.*give a finite number"):
        create("sloped_toy", slopes=[value])


def rewrite(folder, **tensors):
    """Replace some weights, and their digest in the config."""
    data = save({**load_file(folder / WEIGHTS), **tensors})
    (folder / WEIGHTS).write_bytes(data)
    change(folder, weights_sha256=hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"head.weight": torch.zeros(1, 8).to(torch.float8_e4m3fn)}, "float32, float8_e4m3fn; all must be"),
        ({"head.bias": torch.zeros(1, dtype=torch.bfloat16)}, "bfloat16, float32; all must be one of"),
        ({"head.weight": torch.zeros(1, 8, dtype=torch.int64)}, "dtype torch.int64, where torch.float32 is meant"),
        ({"steps": torch.tensor(0.5)}, "steps has dtype torch.float32"),
    ],
)
def test_dtypes_that_no_layer_computes_in_are_refused(saved, tensors, words):
    rewrite(saved[0], **tensors)
    with pytest.raises(UserError, match=words):
        load_plugin(saved[0])


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "zeros"])
def test_pipes_devices_and_huge_files_are_no_plugin(saved, name, kind):
    path = saved[0] / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << (40 if kind == "sparse" else 22))
    with pytest.raises(UserError, match=r"not a plain file|over the limit|cannot be read"):
        load_plugin(saved[0])
