"""Local training and evaluation; knows nothing of Flower."""
