"""Other people's files, and our own, to a Model: what is in them, and does it fit."""
