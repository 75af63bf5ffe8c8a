"""How alike the local representations of an image are."""
