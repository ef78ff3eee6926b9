"""The ``nsa-cp`` command."""
