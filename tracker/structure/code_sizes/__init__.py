"""The integers in a model's own Python code: traced, recorded, solved for, and set."""
