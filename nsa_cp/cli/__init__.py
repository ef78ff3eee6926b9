"""The ``nsa-cp`` command; it starts in ``main.py``."""
