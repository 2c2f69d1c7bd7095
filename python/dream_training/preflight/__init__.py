"""Whether a run can learn, said before it starts."""
