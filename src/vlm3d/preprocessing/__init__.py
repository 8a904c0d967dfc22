"""Scan to model input, and model masks back to the scan."""
