"""Layers of the language model that read a dropped picture again."""
