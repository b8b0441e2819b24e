"""The networks: plain `torch.nn.Module`s that know nothing of the rest, and reading their weights."""
