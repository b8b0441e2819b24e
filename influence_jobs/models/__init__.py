"""Networks as plain `torch.nn.Module`s without ties to the other packages, and weight loading."""
