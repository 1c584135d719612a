"""Preference losses: pure functions of errors, found by name."""
