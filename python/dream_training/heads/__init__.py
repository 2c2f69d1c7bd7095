"""Which heads of the reader receive the scores."""
