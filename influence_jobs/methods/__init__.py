"""From activations, norms, losses and pixels to scores of every (query, training sample): arrays in, arrays out."""
