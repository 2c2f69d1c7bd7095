"""Teaching once: the reader's verdicts on all lines, written for any number of trainings."""
