"""Training and evaluation data of users: the forms it comes in, targets, mining, statistics."""
