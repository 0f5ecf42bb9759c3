"""How each backend tiles a block: :mod:`cpu`, :mod:`cuda` and :mod:`triton`."""
