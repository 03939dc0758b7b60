"""One file per way to grow: each makes a plan for any model that has what it needs, or says why not."""
