"""The modules that all other packages use: config, registries, errors, atomic directories, processes, DeepSpeed."""
