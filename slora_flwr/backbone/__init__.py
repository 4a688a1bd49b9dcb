"""The pretrained transformer W_0, and the weights an adapter stands on."""
