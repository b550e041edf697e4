"""One module a command: ``run(config, path)`` puts the rooms together and writes the run directory ``path``."""
