"""From frozen observations to findings: pure arithmetic, plain data, histories of epochs, recommendations."""
