"""Recipes of Model Optimizer (``quant_cfg`` lists), read by its own loader and turned into recipes of ours.

recognise.py   whose recipe a name or a file is
library.py     the file found, checked, and given to its loader, which runs in a process of its own
worker.py      that process
entries.py     what comes back: plain data
quantizers.py  the quantizers that a model has there, and what a list of entries makes of them
numerics.py    which number format a quantizer has
algorithm.py   which method of ours its calibration algorithm is
convert.py     a recipe of ours, for one model, and what is told with it
"""
