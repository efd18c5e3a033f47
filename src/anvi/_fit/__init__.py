"""From terms to weights: the one training loop and what belongs to it."""
