"""What evaluate.py measures: the networks, their distances and scores, the tables."""
