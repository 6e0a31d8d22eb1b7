"""From files that people have to tensors that models take: formats, media, encoding, batching, and the ledger of what
was lost."""
