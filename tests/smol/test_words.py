import torch

from lit_reduce_smol.projector import Projector, averaged, folded
from lit_reduce_smol.words import BagOfWords, bags, common_words, embeddings_of


def test_words_bags_and_embeddings(tokenizer):
    captions = [["A red dog.", "The dog"], ["a cat"]]
    assert common_words([c for some in captions for c in some], least=2) == ["a", "dog"]
    assert bags(captions, ["cat", "dog"]).tolist() == [[0, 1], [1, 0]]
    table = torch.randn(264, 8)
    found = embeddings_of(["dog"], tokenizer, table)
    expected = table[tokenizer(" dog", add_special_tokens=False).input_ids].mean(0)
    torch.testing.assert_close(found[0], expected / expected.norm())


def test_learns_which_word_a_patch_shows():
    g = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 5, (200, 4), generator=g)  # each token shows one of five things
    states = torch.eye(5)[kinds] @ torch.randn(5, 16, generator=g)
    bag = torch.nn.functional.one_hot(kinds, 5).amax(1).float()
    words = torch.nn.functional.normalize(torch.randn(5, 12, generator=g), dim=-1)
    torch.manual_seed(0)
    projector, model = Projector(16, 12), BagOfWords(words, bag.mean(0), 4)
    projector.standardise(states)
    optimizer = torch.optim.Adam([*projector.parameters(), *model.parameters()], 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(projector, states[:150], bag[:150]).backward()
        optimizer.step()
    assert ((model.logits(projector, states[150:]) > 0) == (bag[150:] > 0)).float().mean() > 0.97


def test_folded_projector_is_that_of_llava():
    torch.manual_seed(0)
    projector, states = Projector(6, 8), torch.randn(3, 4, 6) * 5 + 2
    projector.standardise(states)
    words = torch.randn(20, 8) * 3
    projector.match_norm(states, words)
    torch.testing.assert_close(projector(states).norm(dim=-1).mean(), words.norm(dim=-1).mean())
    weights = folded({f"projector.{name}": x for name, x in projector.state_dict().items()})
    hidden = torch.nn.functional.gelu(states @ weights["linear_1.weight"].T + weights["linear_1.bias"])
    found = hidden @ weights["linear_2.weight"].T + weights["linear_2.bias"]
    torch.testing.assert_close(found, projector(states))


def test_averaged_squares():
    grid = torch.arange(16.0).view(1, 16, 1)
    assert averaged(grid, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert averaged(grid, 4) is grid
