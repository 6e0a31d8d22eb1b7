"""Layers with adapters, one file per kind of layer."""
