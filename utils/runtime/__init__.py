"""What every other layer stands on: errors, files, seeds, memory, Colab.

Imports torch, numpy and the standard library only, and nothing else from ``utils``.
"""
