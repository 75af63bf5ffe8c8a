"""Accuracy while the network is damaged inside."""
