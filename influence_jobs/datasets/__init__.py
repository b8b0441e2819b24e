"""Training data with stable integer sample ids: MNIST, patches of an image folder, and noise."""
