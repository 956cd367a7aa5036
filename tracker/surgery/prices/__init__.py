"""What a change costs: in the loss, parameters, FLOPs and milliseconds; which units a budget takes."""
