"""Rows -> text -> tokens: what is trained, and its cache on disk. Knows files, the tokenizer and its template, and
nothing of models, devices or torch.distributed: whoever runs it on one rank of each node passes that in (`ranks`)."""
