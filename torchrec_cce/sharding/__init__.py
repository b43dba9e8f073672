"""Models on several ranks: where tables go, and maps and clusterings that all ranks share."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
