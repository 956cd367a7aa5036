"""Fashion-MNIST: the reader, the embedded sample, and the place for the full set."""
