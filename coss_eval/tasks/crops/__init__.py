"""Accuracy and stability on crops of the images."""
