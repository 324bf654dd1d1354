"""The bundled experiments; each is a package with its own config, stages and report."""
