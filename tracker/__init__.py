"""Neuron tracking, analysis and surgery for any `torch.nn.Module`."""
