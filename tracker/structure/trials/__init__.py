"""Removals tried in float64 on copies that share storage with the model, before they are offered."""
