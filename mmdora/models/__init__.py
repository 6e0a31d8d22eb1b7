"""Models: their parts, loading, composing, vision encoders, projectors, new tokens."""
