"""Engines that execute runs: in this process, or in Flower's simulation on Ray."""
