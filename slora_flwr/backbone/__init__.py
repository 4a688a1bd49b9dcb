"""The pretrained transformer W_0, and the base that an adapter stands on."""
