"""Rows -> text -> tokens: what is trained, and its cache on disk. Knows files, the tokenizer and its template, and
nothing of models, devices or ranks: whoever needs a cache has one rank of each node prepare it."""
