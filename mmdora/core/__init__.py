"""What everything stands on: the config schema, registries, errors, atomic directories, processes, DeepSpeed."""
