"""From a forward pass to frozen records: neuron ids, hooks, what consumers read."""
