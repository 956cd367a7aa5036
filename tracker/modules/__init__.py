"""What is known of module classes."""
