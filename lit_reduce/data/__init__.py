"""Formats that users have: pictures and JSON lines."""
