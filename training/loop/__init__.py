"""Preference training itself: pairs, policy and reference, optimizer, checkpoints, diagnostics, processes."""
