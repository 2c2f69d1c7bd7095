"""The frozen language model that predicts targets from scored documents."""
