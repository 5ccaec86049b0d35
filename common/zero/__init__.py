"""DeepSpeed ZeRO-3: its configuration, engine, what stays whole during a step, memory, checkpoints.

May know common.model, step, data, files, ranks and config; nothing of common.run, common.verbs or the scripts.
"""
