"""The Triton implementation of the operator; see README.md. Importing it does not import triton."""
