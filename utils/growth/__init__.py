"""Growth: models that get bigger while they train, exactly where mathematics allows, and with the way back open.

From a wish (`request`) an operator makes a plan of plain edits, tried on a copy (`scratch`); one transaction applies
it, lets every part of the run follow, and certifies on real batches what it did to the function.
"""
