"""The changes, one file each: a request becomes a frozen plan."""
