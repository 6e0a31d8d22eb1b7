"""How much memory a run takes before it is started: `mmdora plan`.

meter.py runs one micro-batch on the meta device; engines.py adds what each ZeRO stage and offload holds beside it.
"""
