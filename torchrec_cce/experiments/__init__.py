"""The laboratory: methods compared on one log, reports of what they came to, and logs made for the purpose."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
