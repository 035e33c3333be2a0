"""Files as bytes: reading, writing, headers, dtypes, hashes. Knows nothing of models."""
