"""Methods against forgetting, one in each file; `utils.continual.method` is what they have in common."""
