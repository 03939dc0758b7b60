"""What a notebook shows while something runs; everything else here works without a notebook."""
