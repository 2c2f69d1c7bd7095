"""Loading and building the models: reader, retriever, the packaged one, and their shapes."""
