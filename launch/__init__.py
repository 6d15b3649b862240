"""What is done around a training run: installing, and preparing hosts."""
