"""Training: the only room that knows devices, files and the order of things."""
