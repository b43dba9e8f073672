"""Collections of tables that take the place of TorchRec's, and a single table that takes that of PyTorch's."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
