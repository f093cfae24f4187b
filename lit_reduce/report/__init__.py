"""Tables, plots, pages and overlays of what was measured."""
