"""What differential privacy costs, and the noise that pays for it."""
