"""Reducers inside the language model: hooks before its layers, its slot cache and its attention rows."""
