"""Training objectives. One module each: pure functions (losses, targets), and a Module that the trainer runs.

Such a Module holds the student it trains, computes from one encoded batch a dict of scalar losses of which "loss" is
minimised, and knows nothing of data, optimizers or files.
"""
