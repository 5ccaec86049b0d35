"""What one optimizer step computes: which samples, at what learning rate, laid out how, and the loss.

Pure functions of their arguments: no DeepSpeed, no files, no process group.
"""
