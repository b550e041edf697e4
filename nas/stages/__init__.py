"""One module per command: ``run(config, path)`` connects the packages and writes the run directory ``path``."""
