"""transformers' model on packed rows: attention, log-probabilities, gradient sums, load, export. Knows step/'s packing,
data/'s template, the ranks and zero.Init's handing out of shards; nothing of the engine, the optimizer or the run."""
