"""How much of the classes a frozen representation knows."""
