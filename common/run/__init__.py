"""What a run leaves behind: its folder, record, metrics and reference cache.

May know every room but the verbs; nothing here changes what is trained.
"""
