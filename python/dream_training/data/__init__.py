"""Data sets: what an installation already has, and the forms users already have."""
