"""Mechanisms shared by train_sft.py and train_dpo.py: one room for each thing."""
