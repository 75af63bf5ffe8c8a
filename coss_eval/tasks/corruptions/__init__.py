"""Accuracy under image corruptions, made here or read from files."""
