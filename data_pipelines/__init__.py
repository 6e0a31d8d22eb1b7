"""Data pipelines: dataset formats, media decoding, encoding, batching, and the ledger of skipped samples."""
