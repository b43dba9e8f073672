"""Maps from raw IDs to pointers: in memory, in files, and in a registry of published versions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
