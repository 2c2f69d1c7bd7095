"""Several trainings side by side: objectives, settings, choices of heads."""
