"""What a retriever is trained towards: the objectives that share data, pools and driver."""
