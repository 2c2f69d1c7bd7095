"""What each ``dream`` command does once its options are read."""
