"""What a model is called with: example calls, batches of any shape, and one forward pass that leaves no trace."""
