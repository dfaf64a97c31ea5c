"""From training examples to activations and losses, and from losses to a choice."""
