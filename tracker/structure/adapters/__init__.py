"""Modules of other libraries whose code ties sizes that pruning must be able to part."""
