"""Estimate a run's memory before it starts, for `mmdora plan`.

activations.py runs one micro-batch on the meta device. engine_memory.py adds what each ZeRO stage and offload needs.
planner.py combines the two for a run and finds the largest micro-batch that fits.
"""
