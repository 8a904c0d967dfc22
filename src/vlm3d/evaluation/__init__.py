"""Figures of merit: predictions against truth."""
