"""Continual learning: task after task, and what keeps the old ones from being forgotten."""
