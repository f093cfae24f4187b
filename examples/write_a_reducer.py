"""Write two reducers, one without weights and one that is trained, and attach both to a model.

Run ``python examples/write_a_reducer.py``; it takes seconds, offline. In a package of your own, announce such classes
as entry points of the group ``lit_reduce.reducers``.
"""

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from train_for_your_backbone import QUICK, save_tiny, train, write_rows

from lit_reduce import Reducer, ReducerConfig, ScoringReducer, VisualTokens, attach, create, load_backbone, register


@register
class LongestTokens(ScoringReducer):
    """Keeps the visual tokens with the largest L2 norm."""

    name = "longest_tokens"
    paper = "example"

    def score(self, tokens: VisualTokens) -> Tensor:
        """Norms ``[B, N]``."""
        norms: Tensor = tokens.features.float().norm(dim=-1)
        return norms


@dataclass
class TinyScorerConfig(ReducerConfig):
    """Size of the scorer."""

    hidden_size: int = field(default=0, metadata={"help": "width of the backbone's visual tokens; set when training"})
    width: int = field(default=32, metadata={"help": "width inside the scorer"})


@register
class TinyScorer(ScoringReducer):
    """Scores each visual token with a two-layer MLP; distillation trains it."""

    name = "tiny_scorer"
    trained = True
    paper = "example"
    config_class = TinyScorerConfig

    def __init__(self, config: TinyScorerConfig | None = None) -> None:
        super().__init__(config)
        self.mlp = nn.Sequential(
            nn.RMSNorm(self.config.hidden_size, eps=1e-6),
            nn.Linear(self.config.hidden_size, self.config.width),
            nn.GELU(),
            nn.Linear(self.config.width, 1, bias=False),
        )

    def score(self, tokens: VisualTokens) -> Tensor:
        """Scores ``[B, N]``."""
        scores: Tensor = self.mlp(tokens.features)[..., 0]
        return scores


def kept_by(backbone: Any, reducer: Reducer | Path, keep: int) -> int:
    """How many visual tokens the language model reads of one image."""
    inputs = backbone.prepare([Image.new("RGB", (48, 48), "red")], ["what is on the left ?"])
    with attach(backbone.model, reducer, keep=keep) as attached, torch.no_grad():
        backbone.model(**inputs)
    return attached.stats.kept


def main() -> dict[str, int]:
    """Attach both reducers, the second one after a training of seconds."""
    with TemporaryDirectory() as place:
        folder = save_tiny(Path(place) / "backbone")
        rows = write_rows(Path(place) / "data")
        plugin = train(folder, rows, Path(place) / "out", "reducer=tiny_scorer", "reducer.options.width=8", *QUICK)
        backbone = load_backbone(str(folder))
        kept = {
            "longest_tokens": kept_by(backbone, create("longest_tokens"), keep=6),
            "tiny_scorer": kept_by(backbone, plugin, keep=6),
        }
    print(kept)
    return kept


if __name__ == "__main__":
    main()
