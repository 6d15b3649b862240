"""Text to batches: sources, tokenizer, sealed shards, the global order, packing and the loader."""
