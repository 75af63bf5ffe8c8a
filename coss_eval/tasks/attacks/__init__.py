"""Robust accuracy, and how far the representation moves, under adversarial attacks."""
