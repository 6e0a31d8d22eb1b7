"""Layers with adapters: one file for each kind of layer."""
