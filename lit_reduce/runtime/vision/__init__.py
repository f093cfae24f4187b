"""Reducers inside the vision tower: hooks for batched towers, packed towers and registers."""
