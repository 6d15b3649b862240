"""Muon for matrices, AdamW for the rest: groups, steps, clipping and the learning-rate schedule."""
