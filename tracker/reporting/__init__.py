"""Findings, changes and runs as text, figures and one HTML page."""
