"""The commands: each reads its settings, checks them, calls the library and prints the result."""
