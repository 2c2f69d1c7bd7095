"""A run: the driver, what happens around its steps, what it will cost, and several of them."""
