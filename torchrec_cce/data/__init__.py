"""Click logs: readers and writers of files, batches, vocabularies, and logs that hold pointers in place of raw IDs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
