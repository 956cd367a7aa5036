"""What changes are computed and priced from: consumers' inputs, curvature and gradients of the loss."""
