"""The parts of the facade that have no folder of their own: each can be built and tested without it."""
