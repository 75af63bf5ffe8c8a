"""The readers of each layout that ``data.layouts`` recognises, from files to a Dataset."""
