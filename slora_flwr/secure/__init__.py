"""Secure aggregation: keys, shares and masks, by which the server learns sums alone.

After Bonawitz et al. (CCS 2017), with the graph of Bell et al. (CCS 2020). Nothing here
knows of Flower, models or runs.
"""
