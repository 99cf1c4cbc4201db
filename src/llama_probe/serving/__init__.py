"""`generate()`, `forward()` and `classify()` with heads."""
