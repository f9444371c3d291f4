"""The part of the package that travels with every checkpoint: configuration, model, connector and its parts."""
