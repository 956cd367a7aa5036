"""What optimizers keep for each parameter, moved along with a change; fresh slots; state that nobody moved."""
