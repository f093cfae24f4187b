"""Reading rows of attention and other signals without building attention maps."""
