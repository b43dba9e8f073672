"""Methods of compression: their configurations, and which size each has under a limit on parameters."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
