"""What is built on the operator: reader, heads, data, objectives, training, evaluation."""
