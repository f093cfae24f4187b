"""The reference backbone: a rendered world of questions, and the recipe of a small LLaVA that was trained on it."""
